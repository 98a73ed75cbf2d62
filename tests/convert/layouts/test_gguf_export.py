"""Tests of writing GGUF, with the package gguf as the independent reader and dequantiser."""

import dataclasses
import functools
import json
import math

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from command import fastvlm
from gguf import GGMLQuantizationType as Kind
from random_model import random_variables
from tokenizer_files import LINES

import fastvlm_jax
from fastvlm_jax import convert, model_io
from fastvlm_jax.convert.mapping import read_tree
from fastvlm_jax.generate import generate
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.bpe import byte_spelling
from fastvlm_jax.text.gguf import gguf_tokenizer, read_gguf_tokenizer
from fastvlm_jax.text.tokenizer import bpe_tokenizer, load_tokenizer

LLM = dict(vocab_size=400, width=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96)
QWEN2 = {"llm": LLM, "dtype": "float32"}
LLAMA = {"llm": {**LLM, "qkv_bias": False, "tie_embeddings": False, "head_dim": 32}, "dtype": "float32"}
STUB = {
    "llm": {**LLM, "tie_embeddings": False},
    "dtype": "float32",
    "vision": dict(layers=[1], embed_dims=[8], mixers=["repmixer"], form="folded"),
}
TEXTS = ["what color is it?", " red,  blue\n\n12", "<|im_end|> </s> <image>", "naïve 東京 🙂", "", "a▁b"]
LINEAGE = {"stage": "stage2", "parent": {"stage": "stage1", "parent": {"path": "/models/Qwen2-0.5B", "layout": "hf"}}}


@pytest.fixture(scope="module")
def processor(sentencepiece_file):
    return Processor(load_tokenizer(sentencepiece_file), "qwen_2", 0, 0)


@functools.cache
def variables_of(architecture):
    return random_variables({"qwen2": QWEN2, "llama": LLAMA}[architecture])[1]


def write(target, config, variables, processor, **options):
    convert.write(target, "gguf", variables, config, processor, LINEAGE, **options)
    return next(target.iterdir())


def ours_in_their_order(variables, architecture):
    """Our variables as PyTorch's matrices under llama.cpp's names, with the rows of a Llama's heads permuted."""
    params = variables["params"]["llm"]
    tensors = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]["scale"]}
    if "lm_head" in params:
        tensors["output.weight"] = params["lm_head"]["kernel"].T
    layers = params["layers"]
    for i in range(2):
        blk = f"blk.{i}."
        tensors[blk + "attn_norm.weight"] = layers["attention_norm"]["scale"][i]
        tensors[blk + "ffn_norm.weight"] = layers["mlp_norm"]["scale"][i]
        for ours, theirs in dict(q="attn_q", k="attn_k", v="attn_v", o="attn_output").items():
            tensors[f"{blk}{theirs}.weight"] = layers[ours]["kernel"][i].T
            if "bias" in layers[ours]:
                tensors[f"{blk}{theirs}.bias"] = layers[ours]["bias"][i]
        for x in ("gate", "up", "down"):
            tensors[f"{blk}ffn_{x}.weight"] = layers[x]["kernel"][i].T
        for x, heads in (("q", 4), ("k", 2)) if architecture == "llama" else ():
            rows = tensors[f"{blk}attn_{x}.weight"]
            # A pair of our rows (i, i + 16) of a head stands side by side in the file: 0, 16, 1, 17, ...
            order = [32 * head + i + 16 * half for head in range(heads) for i in range(16) for half in range(2)]
            tensors[f"{blk}attn_{x}.weight"] = rows[order]
    return tensors


def q8_0(x):
    """The bytes of ggml's reference: 32 values share the float16 scale max|x| / 127; halves round away from zero."""
    out = b""
    for block in np.asarray(x, np.float32).reshape(-1, 32):
        scale = np.float32(np.abs(block).max()) / np.float32(127)
        inverse = np.float32(1) / scale if scale else np.float32(0)
        values = [math.floor(abs(float(v)) + 0.5) * (1 if v >= 0 else -1) for v in block * inverse]
        out += np.float16(scale).tobytes() + np.array(values, np.int8).tobytes()
    return out


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_gguf_reads_every_tensor_in_its_place_and_type(architecture, kind, processor, tmp_path):
    variables = variables_of(architecture)
    config = {"qwen2": QWEN2, "llama": LLAMA}[architecture]
    file = write(tmp_path / "out", config, variables, processor, gguf_type=kind)
    assert file.name == f"model-{kind}.gguf"
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    expected = ours_in_their_order(variables, architecture)
    assert found.keys() == expected.keys()
    encode = {"f32": lambda x: x.tobytes(), "f16": lambda x: x.astype(np.float16).tobytes(), "q8_0": q8_0}[kind]
    for name, x in expected.items():
        matrix = x.ndim == 2
        assert found[name].tensor_type == (Kind[kind.upper()] if matrix else Kind.F32), name
        assert tuple(found[name].shape) == x.shape[::-1], name
        assert found[name].data.tobytes() == (encode(x) if matrix else x.tobytes()), name


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_variables_and_sizes_come_back(architecture, processor, tmp_path):
    """float16: the rounded weights; Q8_0: what the package gguf dequantises; norms and biases bit for bit."""
    variables, config = variables_of(architecture), {"qwen2": QWEN2, "llama": LLAMA}[architecture]

    def through_q8_0(x):
        rows = x.T if x.ndim == 2 else x.swapaxes(1, 2)
        back = gguf.dequantize(gguf.quantize(np.ascontiguousarray(rows), Kind.Q8_0), Kind.Q8_0)
        return back.T if x.ndim == 2 else back.swapaxes(1, 2)

    def rounded(path, x, matrix):
        return matrix(x) if path[-1].key == "kernel" else x

    halves = jax.tree_util.tree_map_with_path(
        functools.partial(rounded, matrix=lambda x: x.astype(np.float16).astype(np.float32)), variables
    )
    eighths = jax.tree_util.tree_map_with_path(functools.partial(rounded, matrix=through_q8_0), variables)
    embedding = variables["params"]["llm"]["embedding"]
    halves["params"]["llm"]["embedding"] = embedding.astype(np.float16).astype(np.float32)
    eighths["params"]["llm"]["embedding"] = gguf.dequantize(gguf.quantize(embedding, Kind.Q8_0), Kind.Q8_0)
    for kind, expected in (("f32", variables), ("f16", halves), ("q8_0", eighths)):
        write(tmp_path / kind, config, variables, processor, gguf_type=kind)
        loaded = model_io.read(tmp_path / kind)
        assert loaded.config["llm"].items() >= config["llm"].items()
        jax.tree.map(np.testing.assert_array_equal, read_tree(loaded.variables), expected)


def test_metadata_names_what_llama_cpp_asks_for(processor, tmp_path):
    file = write(tmp_path / "mine", LLAMA, variables_of("llama"), processor, gguf_type="q8_0")
    fields = {key: (field.contents(), field.types[0].name) for key, field in gguf.GGUFReader(file).fields.items()}
    sizes = {
        "vocab_size": 400, "context_length": 32768, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32,
    }  # fmt: skip
    tokens = {"bos_token_id": 0, "eos_token_id": 3, "padding_token_id": 0, "unknown_token_id": 1}
    expected = {
        "general.architecture": ("llama", "STRING"),
        "general.type": ("model", "STRING"),
        "general.name": ("mine", "STRING"),
        "general.finetune": ("stage2", "STRING"),
        "general.base_model.count": (1, "UINT32"),
        "general.base_model.0.name": ("Qwen2-0.5B", "STRING"),
        "general.file_type": (7, "UINT32"),
        "general.quantization_version": (2, "UINT32"),
        **{f"llama.{key}": (value, "UINT32") for key, value in sizes.items()},
        "llama.rope.freq_base": (1e6, "FLOAT32"),
        "llama.attention.layer_norm_rms_epsilon": (float(np.float32(1e-6)), "FLOAT32"),
        "tokenizer.ggml.model": ("llama", "STRING"),
        "tokenizer.ggml.pre": ("default", "STRING"),
        **{f"tokenizer.ggml.{key}": (value, "UINT32") for key, value in tokens.items()},
        "tokenizer.ggml.add_bos_token": (False, "BOOL"),
        "tokenizer.ggml.add_eos_token": (False, "BOOL"),
        "tokenizer.ggml.add_space_prefix": (False, "BOOL"),
    }
    assert {key: fields[key] for key in expected} == expected
    template = fields["tokenizer.chat_template"][0]
    assert "<|im_start|>" in template and "You are a helpful assistant." in template
    rest = {key for key in fields if not key.startswith("GGUF.")} - set(expected) - {"tokenizer.chat_template"}
    assert rest == {f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores")}


def words_tokenizer(kind):
    """A byte-level BPE tokenizer of a kind: all bytes, two merges, three special tokens."""
    vocab = {letter: byte for byte, letter in enumerate(byte_spelling())} | {"he": 256, "Ġw": 257}
    special = {"<|endoftext|>": 258, "<|im_start|>": 259, "<|im_end|>": 260}
    return bpe_tokenizer(vocab, [("h", "e"), ("Ġ", "w")], special, kind, "tokenizer.json")


@pytest.fixture(params=["qwen2", "smollm", "gpt2", "trained here", "llama"])
def tokenizer(request, sentencepiece_file, llama_file):
    files = {"trained here": sentencepiece_file, "llama": llama_file}
    return load_tokenizer(files[request.param]) if request.param in files else words_tokenizer(request.param)


def test_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    kinds = {bool: "bool", int: "uint32", str: "string", list: "array"}
    for key, value in gguf_tokenizer(tokenizer, 450).items():
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    if tokenizer.bos is not None:
        writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.special_id(tokenizer.end))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "vocabulary.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 450
    read = read_gguf_tokenizer(tmp_path / "vocabulary.gguf")
    for text in [*LINES[:6], "hello world", *TEXTS]:
        assert read.encode(text) == tokenizer.encode(text), text
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    names = ("vocab_size", "bos", "end", "pad", "image", "image_id")
    assert [getattr(read, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert read.special_id(read.end) == tokenizer.special_id(tokenizer.end)


def test_a_whole_model_gives_its_language_model_which_answers_the_same(monkeypatch, capsys, processor, tmp_path):
    """`fastvlm convert` says what it leaves out; greedy answers equal those of the weights rounded to float16."""
    _, variables = random_variables(STUB)
    head = variables["params"]["llm"]["lm_head"]["kernel"]
    head[:, :261] = head[:, processor.tokenizer.vocab_size :] = 0  # so that an answer is text
    whole = dataclasses.replace(processor, image_size=32, tokens_per_image=1)
    convert.write(tmp_path / "whole", "native", variables, STUB, whole, {})
    arguments = [f"--source={tmp_path / 'whole'}", f"--target={tmp_path / 'out'}", "--layout=gguf"]
    status, out, _ = fastvlm(monkeypatch, capsys, "convert", *arguments)
    assert (status, out) == (
        0,
        f"wrote {tmp_path / 'out'} (gguf, the language model alone: no encoder, no projector)\n",
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-f16.gguf"]
    llm = {"params": {"llm": variables["params"]["llm"]}}
    alone = {"llm": STUB["llm"], "dtype": "float32"}
    convert.write(tmp_path / "half", "native", llm, alone, processor, {}, dtype="float16")
    answers = [
        generate(*fastvlm_jax.load(tmp_path / name, "float32"), None, ["is it red?", "what"], max_tokens=9)
        for name in ("half", "out")
    ]
    assert answers[0] == answers[1] and len(set(answers[0])) == 2
    # The same command replaces the file, and the file is a source like any other.
    again = ["convert", *arguments, "--gguf_type=q8_0", "--overwrite"]
    assert fastvlm(monkeypatch, capsys, *again)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-q8_0.gguf"]
    back = ["convert", f"--source={tmp_path / 'out'}", f"--target={tmp_path / 'hf'}", "--layout=hf"]
    assert fastvlm(monkeypatch, capsys, *back)[0] == 0 and convert.recognise(tmp_path / "hf") == "decoder"


def test_the_template_comes_back(llama_file, tmp_path):
    for template, tokenizer in (("vicuna_v1", load_tokenizer(llama_file)), ("qwen_2", words_tokenizer("qwen2"))):
        write(tmp_path / template, QWEN2, variables_of("qwen2"), Processor(tokenizer, template, 0, 0))
        read, before = model_io.read(tmp_path / template).processor, Processor(tokenizer, template, 0, 0)
        assert (read.template, read.end_ids) == (template, before.end_ids)
        talk = (("user", ("is it red?",)), ("assistant", ("no",)), ("user", ("why?",)))
        np.testing.assert_array_equal(read.segment(talk, True).tokens, before.segment(talk, True).tokens)


def test_rows_without_whole_blocks_stay_float16_and_are_named(processor, tmp_path, caplog):
    config = {"llm": {**LLM, "mlp_dim": 48, "num_layers": 1}, "dtype": "float32"}
    file = write(tmp_path / "out", config, random_variables(config)[1], processor, gguf_type="q8_0")
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == Kind.F16 and types["blk.0.ffn_up.weight"] == Kind.Q8_0
    assert "blk.0.ffn_down.weight, as 32 does not divide their rows: f16 instead of q8_0" in caplog.text


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("f16", 65520.0, "blk.1.ffn_up.weight has values that f16 cannot hold: choose bf16 or f32"),
        ("q8_0", 8.4e6, "blk.1.ffn_up.weight has values that q8_0 cannot hold: choose bf16 or f32"),
        ("q8_0", np.nan, "blk.1.ffn_up.weight has values that q8_0 cannot hold: choose bf16 or f32"),
    ],
)
def test_values_that_do_not_fit_are_refused_and_nothing_is_left(kind, value, words, processor, tmp_path):
    variables = jax.tree.map(np.copy, variables_of("qwen2"))
    variables["params"]["llm"]["layers"]["up"]["kernel"][1, 5, 7] = value
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "out", QWEN2, variables, processor, gguf_type=kind)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", QWEN2, variables, processor, gguf_type="f32")


def test_what_a_file_cannot_hold_is_refused_in_one_line(monkeypatch, capsys, processor, tmp_path):
    encoder = {"vision": STUB["vision"], "dtype": "float32"}
    convert.write(tmp_path / "encoder", "native", random_variables(encoder)[1], encoder, None, {})
    convert.write(tmp_path / "llm", "native", variables_of("qwen2"), QWEN2, None, {})
    for arguments, words in (
        ([f"--source={tmp_path / 'encoder'}", "--layout=gguf"], "the gguf layout holds a language model, and this"),
        ([f"--source={tmp_path / 'llm'}", "--layout=gguf"], "the model has no tokenizer, and a GGUF file needs one"),
        ([f"--source={tmp_path / 'llm'}", "--layout=gguf", "--dtype=float16"], "--gguf_type is the type of its"),
        ([f"--source={tmp_path / 'llm'}", "--layout=hf", "--gguf_type=f16"], "--dtype is the type of its weights"),
    ):
        status, _, error = fastvlm(monkeypatch, capsys, "convert", f"--target={tmp_path / 'out'}", *arguments)
        assert status == 1 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_gguf_has_no_name_for_are_refused(json_file, llama_file, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: GGUF has no name for how this tokenizer splits words"):
        gguf_tokenizer(load_tokenizer(json_file), 400)  # Qwen2's words without its NFC form
    with pytest.raises(ValueError, match=r"tokenizer\.json has the id 260 and the model 200 ids: give the model's own"):
        gguf_tokenizer(words_tokenizer("qwen2"), 200)
    model = load_tokenizer(llama_file).library()
    state = json.loads(model.to_str())
    state["model"]["merges"] = state["model"]["merges"][1:]
    tokenizers.Tokenizer.from_str(json.dumps(state)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its merges are not those of a SentencePiece model"):
        gguf_tokenizer(load_tokenizer(tmp_path / "tokenizer.json"), 400)
    state["model"]["vocab"]["<0xZZ>"] = state["model"]["vocab"].pop("<0x41>")
    tokenizers.Tokenizer.from_str(json.dumps(state)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json lacks an unknown token or one of the 256 bytes"):
        gguf_tokenizer(load_tokenizer(tmp_path / "tokenizer.json"), 400)


def test_damaged_pieces_load_or_raise_one_clear_error(processor, tmp_path):
    """Tries 150 mutations of the metadata of a SentencePiece tokenizer."""
    config = {"llm": {**LLM, "num_layers": 1, "width": 32, "mlp_dim": 32}, "dtype": "float32"}
    good = write(tmp_path / "good", config, random_variables(config)[1], processor).read_bytes()
    header, rng, file, refused = good.rindex(b"blk.0.ffn_down"), np.random.default_rng(0), tmp_path / "bad.gguf", 0
    keys = [good.index(b"tokenizer.ggml." + key) for key in (b"model", b"tokens", b"token_type", b"scores", b"unknown")]
    for i in range(150):
        bad = bytearray(good)
        at = int(rng.integers(0, header)) if i % 2 else keys[i // 2 % len(keys)] + int(rng.integers(0, 60))
        bad[at : at + 4] = rng.bytes(4) if i % 3 else bytes(4)
        file.write_bytes(bad)
        try:
            read_gguf_tokenizer(file).encode("is it red?")
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < 600
    assert 20 < refused < 150
