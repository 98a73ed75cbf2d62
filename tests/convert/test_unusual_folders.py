"""Model folders that are not what they seem: adapters, pointers of Git LFS, weights under other prefixes."""

import json
import re

import numpy as np
import pytest
import torch_reference  # noqa: F401 (makes torchvision importable)
import transformers
from safetensors.numpy import load_file, save_file

from fastvlm_jax import convert, model_io
from fastvlm_jax.convert.recognise import gguf_file
from fastvlm_jax.text.tokenizer import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
SIZES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=40, tie_word_embeddings=True,
)  # fmt: skip


def refused(words):
    """Expects one line with `words`."""
    return pytest.raises((ValueError, FileNotFoundError), match=re.compile(rf"^[^\n]*{words}[^\n]*$"))


@pytest.fixture
def folder(tmp_path):
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize("with_config", [True, False])
def test_a_lora_adapter_is_named_with_its_base_model(folder, with_config):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 8}))
    if not with_config:
        (folder / "config.json").unlink()
    with refused("lm adapts org/base, which is not there: give the model too, as base=MODEL,lora="):
        model_io.read(folder)
    with refused("no tokenizer in .*LoRA adapter: give its base model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_models_file_is_named(folder, name):
    (folder / name).write_text(POINTER)
    with refused(f"{name} is a Git LFS pointer and not the content: run `git lfs pull`"):
        model_io.read(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken", "model.gguf"])
def test_a_pointer_of_git_lfs_in_place_of_a_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    for path in (tmp_path, tmp_path / name):
        with refused(f"{name} is a Git LFS pointer"):
            load_tokenizer(path)


def test_a_gguf_file_that_is_missing_or_one_of_two_is_named(tmp_path):
    for read in (gguf_file, convert.READERS["gguf"], load_tokenizer):
        with refused("none.gguf"):
            read(tmp_path / "none.gguf")
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with refused("holds 2 GGUF files: give a .gguf file"):
        convert.READERS["gguf"](tmp_path)


def test_weights_saved_without_the_module_around_them_or_with_a_wrapper_are_read(folder):
    """transformers' own body alone (Qwen2Model) writes `layers.0...`; DDP and torch.compile add prefixes."""
    usual = load_file(folder / "model.safetensors")
    transformers.Qwen2ForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    assert "layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    stored = [load_file(folder / "model.safetensors")]
    stored += [{f"{wrapper}{name}": x for name, x in usual.items()} for wrapper in ("module.", "_orig_mod.")]
    for tensors in stored:
        save_file(tensors, folder / "model.safetensors")
        _, variables = convert.load_weights(folder)
        np.testing.assert_array_equal(variables["params"]["llm"]["embedding"], usual["model.embed_tokens.weight"])
        kernel = np.asarray(variables["params"]["llm"]["layers"]["q"]["kernel"])
        np.testing.assert_array_equal(kernel[1], usual["model.layers.1.self_attn.q_proj.weight"].T)


def test_another_prefix_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "text_model.encoder."): x for name, x in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    with refused("tensors are called text_model.encoder.layers.0.input_layernorm.weight, this package reads model."):
        convert.load_weights(folder)


@pytest.mark.parametrize("layout", ["timm", "openclip"])
def test_a_vision_transformer_is_sent_to_a_layout_that_takes_it(tmp_path, layout):
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).save_pretrained(tmp_path / "vit")
    found = model_io.read(tmp_path / "vit")
    with refused(f"{layout} has no names for this vision transformer: use --layout hf"):
        convert.write(tmp_path / "out", layout, found.variables, found.config, None, {})
    convert.write(tmp_path / "out", "hf", found.variables, found.config, None, {})
    llm = {"llm": dict(width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8, vocab_size=40)}
    with refused("use --layout native, or --source vision=DIR --layout hf for the encoder"):
        convert.write(tmp_path / "out2", layout, found.variables, {**found.config, **llm}, None, {})
