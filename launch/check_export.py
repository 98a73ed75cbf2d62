"""Compares a model with its export, which transformers loads strictly: logits on one image, and answers to easy-VQA."""

import json
import pathlib

import numpy as np
from absl import app, flags, logging

MODEL = flags.DEFINE_string("model", None, "model directory or workdir that was exported", required=True)
EXPORT = flags.DEFINE_string("export", None, "export, in transformers' layout", required=True)
IMAGE = flags.DEFINE_string("image", None, "image file to ask about", required=True)
PROMPT = flags.DEFINE_string("prompt", "what color is the shape?", "question about the image")
DATA = flags.DEFINE_string("data", None, "shards of easy-VQA", required=True)
PREDICTIONS = flags.DEFINE_string("predictions", None, "the model's answers, as evaluate writes them", required=True)
QUESTIONS = flags.DEFINE_integer("questions", 300, "number of answers to compare, from the first", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the result to", required=True)
BOUND = 1e-4  # largest difference of logits that is accepted


def main(_):
    logging.set_verbosity(logging.WARNING)
    import jax
    import torch

    if not torch.cuda.is_available():  # torchvision may be built for another torch; transformers only needs these names
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from transformers import FastVlmForConditionalGeneration

    import fastvlm_jax
    from fastvlm_jax.losses import inputs

    theirs, info = FastVlmForConditionalGeneration.from_pretrained(EXPORT.value, output_loading_info=True)
    unexpected = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if unexpected:
        raise SystemExit(f"check_export: transformers does not load {EXPORT.value} strictly: {unexpected}")
    theirs.eval()

    model, variables, processor = fastvlm_jax.load(MODEL.value)
    batch = processor([IMAGE.value], [PROMPT.value])
    ours = np.asarray(jax.jit(model.apply)(variables, **inputs(batch)))[0, 0, : lengths(batch)]
    with torch.no_grad():
        reference = theirs(**torch_inputs(batch)).logits[0].numpy()
    difference = float(np.abs(ours - reference).max())
    print(f"transformers loads the export strictly; largest difference of the logits: {difference:.1e}")
    if not difference <= BOUND:
        raise SystemExit(f"check_export: the logits differ by {difference}, more than {BOUND}")

    count = compare_answers(theirs, processor)
    print(f"transformers gives the same text to {count} of {count} questions")
    found = {"export_max_abs_diff": difference, "export_same_answers": count}
    pathlib.Path(OUTPUT.value).write_text(json.dumps(found) + "\n")


def lengths(batch) -> int:
    """Returns the number of tokens of the one prompt of a batch."""
    return int((batch.segment_ids > 0).sum())


def torch_inputs(batch) -> dict:
    """Returns the arguments of transformers for a batch of one prompt and one image."""
    import torch

    pixels = torch.from_numpy(batch.images[0].astype(np.float32) / 255).permute(0, 3, 1, 2)
    tokens = torch.from_numpy(batch.tokens[0, :, : lengths(batch)]).long()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}


def compare_answers(theirs, processor) -> int:
    """Returns how many answers transformers was asked for, each of which was the text in the predictions.

    Raises:
      SystemExit: an answer differs; the message shows both.
    """
    from etils import epath

    from fastvlm_jax.evaluate.benchmarks.easy_vqa import OWN, read
    from fastvlm_jax.evaluate.results import read_predictions
    from fastvlm_jax.generate import until

    rows = {row.id: row for row in read(epath.Path(DATA.value))}
    asked = read_predictions(pathlib.Path(PREDICTIONS.value))[: QUESTIONS.value]
    settings = {"max_new_tokens": OWN.max_tokens, "do_sample": False, "eos_token_id": list(processor.end_ids)}
    for prediction in asked:
        row = rows[prediction["id"]]
        batch = processor([picture.read() for picture in row.pictures], [OWN.prompt(row)])
        arguments = torch_inputs(batch)
        ids = theirs.generate(**arguments, **settings, pad_token_id=processor.end_ids[0])[0]
        text = processor.tokenizer.decode(until(ids[arguments["input_ids"].shape[1] :].numpy(), processor.end_ids))
        if text.strip() != prediction["answer"]:
            raise SystemExit(
                f"check_export: to question {row.id} transformers answers {text.strip()!r}, and the predictions say "
                f"{prediction['answer']!r}"
            )
    return len(asked)


if __name__ == "__main__":
    app.run(main)
