"""Compares a model's logits on one image and question with those of its export, which transformers loads strictly."""

import json
import pathlib

import numpy as np
from absl import app, flags, logging

MODEL = flags.DEFINE_string("model", None, "model directory or workdir that was exported", required=True)
EXPORT = flags.DEFINE_string("export", None, "export, in transformers' layout", required=True)
IMAGE = flags.DEFINE_string("image", None, "image file to ask about", required=True)
PROMPT = flags.DEFINE_string("prompt", "what color is the shape?", "question about the image")
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
    from fastvlm_jax.train_step import inputs

    model, variables, processor = fastvlm_jax.load(MODEL.value)
    batch = processor([IMAGE.value], [PROMPT.value])
    length = int((batch.segment_ids > 0).sum())
    ours = np.asarray(jax.jit(model.apply)(variables, **inputs(batch)))[0, 0, :length]

    theirs, info = FastVlmForConditionalGeneration.from_pretrained(EXPORT.value, output_loading_info=True)
    unexpected = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if unexpected:
        raise SystemExit(f"check_export: transformers does not load {EXPORT.value} strictly: {unexpected}")
    pixels = torch.from_numpy(batch.images[0].astype(np.float32) / 255).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = torch.from_numpy(batch.tokens[0, :, :length]).long()
        reference = theirs.eval()(input_ids=tokens, pixel_values=pixels).logits[0].numpy()
    difference = float(np.abs(ours - reference).max())
    pathlib.Path(OUTPUT.value).write_text(json.dumps({"export_max_abs_diff": difference}) + "\n")
    print(f"transformers loads the export strictly; largest difference of the logits: {difference:.1e}")
    if not difference <= BOUND:
        raise SystemExit(f"check_export: the logits differ by {difference}, more than {BOUND}")


if __name__ == "__main__":
    app.run(main)
