"""A published folder's settings, live against transformers: sampling, end ids, round trips, and the distribution."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from random_model import random_variables
from safetensors.numpy import load_file
from small import ask
from torch_reference import jit, randomise, to_nchw, transformers

import fastvlm_jax
from fastvlm_jax import convert, model_io
from fastvlm_jax.cli.generate import generate as command
from fastvlm_jax.generate import generate, generate_tokens, penalise, sample
from fastvlm_jax.images.resize import fit_into
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.sizes import CLIP_COLOURS
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor, load_processor
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer
from fastvlm_jax.text.tokenizer import load_tokenizer

STUB = dict(layers=[1], embed_dims=[8], mixers=["repmixer"], form="folded")
LLM = dict(width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48)
DRAWS = 50_000
GENERATION = {
    "do_sample": True,
    "eos_token_id": [2, 77],
    "pad_token_id": 0,
    "repetition_penalty": 1.3,
    "temperature": 0.6,
    "top_k": 12,
    "top_p": 0.9,
}


def write(source, target, layout):
    loaded = model_io.read(source)
    convert.write(target, layout, loaded.variables, loaded.config, loaded.processor, loaded.lineage)
    return target


def content(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def vicuna(llama_file, tmp_path_factory):
    """Folder of a small Llama as transformers saves it, with settings as Vicuna's and Qwen2's authors chose them."""
    folder = tmp_path_factory.mktemp("settings") / "vicuna"
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    randomise(transformers.LlamaForCausalLM(config), 1).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(llama_file.read_bytes())
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "model_max_length": 4096, "sp_model_kwargs": {},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def test_settings_come_back_as_they_were(vicuna, tmp_path):
    out = write(write(vicuna, tmp_path / "native", "native"), tmp_path / "hf", "hf")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert content(out, name) == content(vicuna, name)
    assert content(out, "config.json")["max_position_embeddings"] == 128


@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config.json", "processor_config.json"])
def test_image_settings_come_back_as_they_were(nested, sentencepiece_file, tmp_path):
    """A FastVLM whose images are centre-cropped; transformers 5 writes the settings into processor_config.json."""
    tokenizer = load_tokenizer(sentencepiece_file)
    config = {"vision": STUB, "llm": {**LLM, "vocab_size": tokenizer.vocab_size}, "dtype": "float32"}
    first = Processor(tokenizer, "qwen_2", 32, fastvlm.build(**config).tokens_per_image(32))
    convert.write(tmp_path / "first", "hf", random_variables(config)[1], config, first, {})
    images = {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0, 0, 0],
        "image_std": [1, 1, 1],
    }  # fmt: skip
    joined = {**content(tmp_path / "first", "processor_config.json"), "image_token": "<image>"}
    (tmp_path / "first" / "preprocessor_config.json").write_text(json.dumps(images))
    if nested:
        (tmp_path / "first" / "preprocessor_config.json").unlink()
        joined["image_processor"] = images
    (tmp_path / "first" / "processor_config.json").write_text(json.dumps(joined))

    write(tmp_path / "first", tmp_path / "native", "native")
    assert fastvlm_jax.load(tmp_path / "native")[2].fit == "crop"
    out = write(tmp_path / "native", tmp_path / "hf", "hf")
    assert content(out, "processor_config.json") == joined
    assert (out / "preprocessor_config.json").exists() is not nested
    if not nested:
        assert content(out, "preprocessor_config.json") == images


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_transformers_reads_the_image_settings_of_stage_0(fit, sentencepiece_file, tmp_path):
    mean, std = CLIP_COLOURS["image_mean"], CLIP_COLOURS["image_std"]
    PairProcessor(load_caption_tokenizer(sentencepiece_file), 77, 32, mean, std, fit).save(tmp_path)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__.startswith("CLIPImageProcessor")
    image, own = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
    fit_into(image, own, fit, exact=True)
    found = theirs(PIL.Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(found.transpose(1, 2, 0) * std + mean, own / 255, atol=1e-5)


def test_greedy_answers_with_a_repetition_penalty_equal_those_of_transformers(vicuna):
    """The penalty changes the answer; any of the stored end ids ends it."""
    model, variables, processor = fastvlm_jax.load(vicuna)
    theirs = transformers.LlamaForCausalLM.from_pretrained(vicuna, dtype=torch.float32).eval()
    assert processor.end_ids == (2, 77) and processor.sampling["repetition_penalty"] == 1.3
    batch = processor([], ["what color is it?", "is it red?"])
    options = dict(max_tokens=24, end=processor.end_ids, repetition_penalty=1.3)
    ours = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), **options))
    for row, segment in enumerate(batch.segment_ids[0]):
        prompt = torch.from_numpy(batch.tokens[0, row : row + 1, : int(segment.sum())]).long()
        ids = theirs.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist()
        plain = theirs.generate(prompt, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
        assert plain[0, prompt.shape[1] :].tolist() != ids
        assert ours[row, : len(ids)].tolist() == ids and set(ours[row, len(ids) :].tolist()) <= {2}


def test_sampling_draws_from_the_distribution_of_transformers(vicuna):
    """Chi-square of 50,000 draws from 64 tokens against the stored settings' processors, at the 99.9th percentile."""
    sampling = load_processor(vicuna).sampling
    seen = torch.tensor([[3, 9, 11, 50]])
    logits = np.random.default_rng(3).normal(0, 0.8, (1, 64)).astype(np.float32)
    warpers = transformers.generation.logits_process
    scores = warpers.RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"])(seen, torch.from_numpy(logits))
    marked = np.isin(np.arange(64), seen.numpy())[None]
    penalised = penalise(logits, marked, sampling["repetition_penalty"])
    np.testing.assert_allclose(penalised, scores.numpy(), rtol=1e-6)
    for warper in (
        warpers.TemperatureLogitsWarper(sampling["temperature"]),
        warpers.TopKLogitsWarper(sampling["top_k"]),
        warpers.TopPLogitsWarper(sampling["top_p"]),
    ):
        scores = warper(seen, scores)
    expected = torch.softmax(scores, -1).numpy()[0] * DRAWS
    many = np.broadcast_to(penalised, (DRAWS, 64))
    drawn = sample(many, jax.random.key(0), sampling["temperature"], sampling["top_p"], sampling["top_k"])
    counts = np.bincount(np.asarray(drawn), minlength=64)
    kept = expected > 0
    assert 3 < kept.sum() <= 12 and not counts[~kept].any()
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < scipy.stats.chi2.isf(1e-3, int(kept.sum()) - 1)


def test_the_command_samples_with_the_stored_settings_when_asked_to(vicuna, capsys):
    loaded = fastvlm_jax.load(vicuna)
    stored, ask = loaded[2].sampling, ["generate", f"--model={vicuna}", "--prompt=red", "--max_tokens=7", "--seed=5"]
    command([*ask, "--sampling=model", "--temperature=9", "--top_k=0"])
    (answer,) = generate(*loaded, [], ["red"], max_tokens=7, seed=5, **{**stored, "temperature": 9.0, "top_k": 0})
    assert capsys.readouterr().out == answer + "\n"


def test_a_prompt_and_its_answer_stay_within_the_context_length(vicuna):
    loaded = fastvlm_jax.load(vicuna)
    length = int(loaded[2]([], ["red " * 5]).segment_ids.sum())
    assert generate(*loaded, [], ["red " * 5], max_tokens=128 - length)
    for options, message in (
        (dict(max_tokens=129 - length), rf"the prompt is {length} tokens long, more than the {length - 1} allowed"),
        (dict(max_length=129), "max_length=129 is beyond the model's context length of 128 tokens"),
        (dict(max_tokens=128), "max_tokens=128 must be less than the model's context length, 128 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*loaded, [], ["red " * 5], **options)


@pytest.mark.parametrize(
    "change",
    [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {"legacy": False, "add_bos_token": False}],
)
def test_tokenizer_settings_give_the_ids_of_transformers(change, vicuna, llama_file, tmp_path):
    """The ids of two turns, without an image, from the folder itself and from what is written for transformers."""
    (tmp_path / "tokenizer.model").write_bytes(llama_file.read_bytes())
    stored = {key: value for key, value in content(vicuna, "tokenizer_config.json").items() if key != "legacy"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stored, **change}))
    processor = load_processor(tmp_path, template="vicuna_v1")
    turns = (("system", ("red",)), *ask(("what color is it?", "red"), ("is it red?", "yes"), images=0))
    ours = processor.segment(turns).tokens.tolist()
    text = "red USER: what color is it? ASSISTANT: red</s>USER: is it red? ASSISTANT: yes</s>"
    assert ours == transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids

    processor.save(tmp_path / "out", export=True)
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours == written(text).input_ids
    chat = [{"role": role, "content": parts[0]} for role, parts in turns]
    assert ours == written.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert load_processor(tmp_path / "out").segment(turns).tokens.tolist() == ours


@pytest.fixture(scope="module")
def full_vocabulary(llama_file, tmp_path_factory):
    """A FastVLM whose Llama vocabulary has a row for each id: (native, exported folder), the head's first row large."""
    tokenizer = load_tokenizer(llama_file)
    llm = {**LLM, "vocab_size": tokenizer.vocab_size, "qkv_bias": False, "tie_embeddings": False}
    config = {"vision": STUB, "llm": llm, "dtype": "float32"}
    variables = random_variables(config)[1]
    variables["params"]["llm"]["lm_head"]["kernel"][:, 0] *= 4
    processor = Processor(tokenizer, "vicuna_v1", 32, fastvlm.build(**config).tokens_per_image(32))
    folder = tmp_path_factory.mktemp("full")
    for layout in ("native", "hf"):
        convert.write(folder / layout, layout, variables, config, processor, {})
    return folder / "native", folder / "hf"


def test_an_export_without_spare_ids_has_the_same_distribution_and_loss(full_vocabulary):
    native, exported = full_vocabulary
    model, variables, processor = fastvlm_jax.load(native)
    theirs = transformers.FastVlmForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    assert theirs.config.text_config.vocab_size == processor.tokenizer.vocab_size
    assert theirs.config.image_token_id == processor.tokenizer.special_id("<unk>") == 0
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    batch = processor([image], ["what color is it?"])
    length = int(batch.segment_ids.sum())
    ids = np.asarray(batch.tokens)[0, :, :length]
    reference = transformers.AutoProcessor.from_pretrained(exported, backend="pil")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is it?"}]
    fields = reference.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    assert fields["input_ids"].tolist() == ids.tolist()
    args = (batch.images, batch.tokens, batch.image_index, batch.positions, batch.segment_ids)
    ours = torch.from_numpy(np.array(jit(model.apply)(variables, *args)))[0, :, :length]
    with torch.no_grad():
        scores = theirs(input_ids=fields["input_ids"], pixel_values=fields["pixel_values"]).logits
        loss = torch.nn.functional.cross_entropy(scores[0, :-1], fields["input_ids"][0, 1:])
    p = torch.softmax(ours, -1)
    assert (torch.softmax(scores, -1) - p).abs().max() < 1e-6
    assert p[..., 0].max() > 0.6  # 64 copies of this row would take 0.98 of all
    ours_loss = torch.nn.functional.cross_entropy(ours[0, :-1], fields["input_ids"][0, 1:])
    assert abs(float(loss) - float(ours_loss)) < 1e-6 * float(loss)


def test_answers_about_an_image_with_a_penalty_equal_those_of_transformers(full_vocabulary):
    """The placeholders of the image count as seen: here their id has the largest logits."""
    native, exported = full_vocabulary
    model, variables, processor = fastvlm_jax.load(native)
    theirs = transformers.FastVlmForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    batch = processor([image], ["is it red?"])
    prompt = torch.from_numpy(np.asarray(batch.tokens)[0, :, : int(batch.segment_ids.sum())]).long()
    pixels = to_nchw(batch.images[0].astype(np.float32) / 255)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=2)
    expected = theirs.generate(input_ids=prompt, pixel_values=pixels, repetition_penalty=1.5, **options)
    expected = expected[0, prompt.shape[1] :].tolist()
    settings = dict(max_tokens=12, end=2, repetition_penalty=1.5, image_id=0)
    ours = np.asarray(generate_tokens(model, variables, batch, jax.random.key(0), **settings))[0]
    assert ours[: len(expected)].tolist() == expected


def test_an_export_without_spare_ids_reads_text_as_before(full_vocabulary):
    native, exported = full_vocabulary
    ours, reference = load_tokenizer(native), transformers.AutoTokenizer.from_pretrained(exported)
    for text in ("what color is it?", "é <unk> ☃", "<image"):
        assert reference(text, add_special_tokens=False, split_special_tokens=True).input_ids == ours.encode(text)
    assert reference.convert_tokens_to_ids("<image>") == 0 and reference.pad_token_id == 2
    again = load_tokenizer(exported)
    assert (again.image, again.image_id, again.end, again.bos) == ("<image>", 0, "</s>", 1)


def test_spare_rows_of_a_padded_vocabulary_hold_the_image_token(llama_file, tmp_path):
    tokenizer = load_tokenizer(llama_file)
    llm = {**LLM, "vocab_size": tokenizer.vocab_size + 5, "qkv_bias": False}
    config = {"vision": STUB, "llm": llm, "dtype": "float32"}
    variables = random_variables(config)[1]
    convert.write(tmp_path / "hf", "hf", variables, config, Processor(tokenizer, "vicuna_v1", 32, 4), {})
    described = content(tmp_path / "hf", "config.json")
    assert described["image_token_index"] == tokenizer.vocab_size
    rows = load_file(tmp_path / "hf" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(rows, variables["params"]["llm"]["embedding"])
