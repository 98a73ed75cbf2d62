"""Reads language models in GGUF, llama.cpp's file format (versions 2 and 3); they cannot be written.

Header, metadata and tensor table are parsed here, and every size is checked against the file before it is used; the
package `gguf` dequantises. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from fastvlm_jax.convert.layouts.text_config import MAX_SIZE
from fastvlm_jax.convert.mapping import LINEAR, MAX_LAYERS, SAME, Row, described, to_jax
from fastvlm_jax.convert.recognise import gguf_file
from fastvlm_jax.text.bpe import JsonTokenizer, bpe_tokenizer

ARCHITECTURES = {"llama": False, "qwen2": True}  # architecture -> whether q, k and v have biases
PLAIN = {Kind.F32: ("F32", np.float32), Kind.F16: ("F16", np.float16), Kind.BF16: ("BF16", ml_dtypes.bfloat16)}
SCALARS = dict(enumerate((*"BbHhIi", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}  # GGUF type number -> struct code
STRING, ARRAY = 8, 9  # GGUF type numbers
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types: special, added but allowed in text, filler
WORDS = {"qwen2": "qwen2", "smollm": "smollm", "gpt-2": "gpt2"}  # `tokenizer.ggml.pre` -> kind of bpe_tokenizer
MAX_ITEMS = 2**24  # tensors, metadata keys or items of one list: beyond any real model
LAYER = {
    "attention_norm/scale": ("attn_norm.weight", SAME),
    "mlp_norm/scale": ("ffn_norm.weight", SAME),
    **{f"{x}/kernel": (f"attn_{x}.weight", LINEAR) for x in "qkv"},
    "o/kernel": ("attn_output.weight", LINEAR),
    **{f"{x}/kernel": (f"ffn_{x}.weight", LINEAR) for x in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """Describes a stored tensor that is dequantised when it is indexed, with the interface of a safetensors slice.

    Attributes:
      data: memory-mapped array: plain numbers in PyTorch's shape, or [..., bytes] of quantised rows.
      kind: type of the stored numbers, plain or quantised.
      shape: sizes in PyTorch's order.
      heads: number of heads of a query or key matrix whose rows llama.cpp has permuted, else 0.
    """

    data: np.ndarray
    kind: Kind
    shape: tuple[int, ...]
    heads: int = 0

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """Returns the stored dtype; "F32" for a quantised tensor, which is dequantised to float32."""
        return PLAIN.get(self.kind, PLAIN[Kind.F32])[0]

    def __getitem__(self, index) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if len(self.shape) < 2 or not isinstance(first, slice):
            return self._rows(slice(None))[index]
        return self._rows(first)[(slice(None), *rest)]

    def _rows(self, rows: slice) -> np.ndarray:
        if self.heads:
            # llama.cpp's rotary embedding pairs neighbouring rows, ours the two halves of a head: row (head, i, half)
            # of the file is our row (head, half, i).
            stored = np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
            data = self.data[stored[rows]]
        else:
            data = self.data[rows]
        return data if self.kind in PLAIN else gguf.dequantize(np.ascontiguousarray(data), self.kind)


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a GGUF file, or the one in a folder: ({"llm": ..., "dtype": ...}, variables as Leaves).

    Raises:
      ValueError: the file is damaged or not supported; the message names it.
    """
    file = gguf_file(source)
    llm, rows, tensors = read_gguf(file)
    model_config = {"llm": llm, "dtype": "float32"}
    _, shapes = described(model_config, file)
    return model_config, to_jax(rows, tensors, shapes, file)


def read_gguf(
    file: str | os.PathLike, path: str = "params/llm"
) -> tuple[dict[str, Any], list[Row], Mapping[str, GgufTensor]]:
    """Opens a Llama or Qwen2 language model; a tensor is read only when it is indexed.

    Args:
      file: a `.gguf` file.
      path: '/'-joined path of the decoder in the variables.

    Returns:
      (arguments of Decoder, the layout, all tensors by name): `to_jax(rows, tensors, shapes, file)` gives variables.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or a key or tensor is missing, unknown or has a value that this package does not
        compute; the message names the file and the key or tensor.
    """
    file = pathlib.Path(file).expanduser()
    metadata, tensors = _read(file)
    llm = _decoder_args(file, metadata, tensors)
    rows = [
        Row("token_embd.weight", f"{path}/embedding"),
        Row("output_norm.weight", f"{path}/final_norm/scale"),
        *(Row(f"blk.{{i}}.{name}", f"{path}/layers/{x}", t, llm["num_layers"]) for x, (name, t) in LAYER.items()),
        *(
            Row(f"blk.{{i}}.attn_{x}.bias", f"{path}/layers/{x}/bias", SAME, llm["num_layers"])
            for x in "qkv"
            if llm["qkv_bias"]
        ),
    ]
    if not llm["tie_embeddings"]:
        rows.append(Row("output.weight", f"{path}/lm_head/kernel", LINEAR))
    names = {name for row in rows for name in row.names()}
    if differing := sorted(names ^ set(tensors)):
        state = "is not part of this architecture" if differing[0] in tensors else "is missing"
        raise ValueError(f"{file}: tensor {differing[0]} {state} ({len(differing)} differ)")
    if metadata["general.architecture"] == "llama":
        for i in range(llm["num_layers"]):
            for x, heads in (("q", llm["num_heads"]), ("k", llm["num_kv_heads"])):
                name = f"blk.{i}.attn_{x}.weight"
                if (found := tensors[name].shape[0]) != heads * llm["head_dim"]:
                    raise ValueError(f"{file}: tensor {name} has {found} rows, which do not match {heads} heads")
                tensors[name] = dataclasses.replace(tensors[name], heads=heads)
    return llm, rows, tensors


def read_gguf_tokenizer(file: str | os.PathLike) -> JsonTokenizer:
    """Reads the byte-level BPE tokenizer inside a GGUF file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or a key is missing, damaged or describes another kind of tokenizer; the message
        names the file and the key.
    """
    file = pathlib.Path(file).expanduser()
    metadata, _ = _read(file)
    prefix = "tokenizer.ggml."

    def table(key: str, kind: type) -> Any:
        value = metadata.get(prefix + key)
        if not isinstance(value, kind) or (kind is not str and not len(value)):
            raise ValueError(f"{file}: {prefix}{key} is {_short(value)}: no byte-level BPE tokenizer can be read")
        return value

    model, words = table("model", str), table("pre", str)
    if model != "gpt2" or words not in WORDS:
        raise ValueError(
            f"{file}: its tokenizer is of the kind {model!r}, {words!r}; only 'gpt2' with {' or '.join(WORDS)} can be "
            "read: put the model's own tokenizer.json or tokenizer.model beside the file"
        )
    tokens, merges, types = table("tokens", list), table("merges", list), table("token_type", np.ndarray)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{file}: {prefix}tokens and {prefix}token_type differ in length, or a token occurs twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"{file}: {prefix}merges has {_short(wrong[0])}, which is not a pair")
    added = {tokens[i]: i for i in map(int, np.flatnonzero((types == CONTROL) | (types == USER_DEFINED)))}
    words_end = max((i for i in range(len(tokens)) if tokens[i] not in added and types[i] != UNUSED), default=-1)
    vocab = {token: i for i, token in enumerate(tokens[: words_end + 1])}
    plain = {token for token, i in added.items() if types[i] == USER_DEFINED}
    config: dict[str, Any] = {"add_bos_token": metadata.get(f"{prefix}add_bos_token", False)}
    for name in ("bos", "eos"):
        at = metadata.get(f"{prefix}{name}_token_id")
        if type(at) is int and 0 <= at < len(tokens):
            config[f"{name}_token"] = tokens[at]
    return bpe_tokenizer(vocab, pairs, added, WORDS[words], file, plain=plain, config=config)


def _decoder_args(file: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"{file}: general.architecture is {kind!r}, this package reads {' and '.join(ARCHITECTURES)}")

    def size(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{kind}.{key}", default)
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise ValueError(f"{file}: {kind}.{key} is {_short(value)}, it must be a whole number from 1 to 2**31 - 1")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{kind}.{key}", default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{file}: {kind}.{key} is {_short(value)}, it must be a positive number")
        return float(str(np.float32(value)))  # 1e-5, not its exact float32 value 9.999999747e-06

    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "expert_count": 0}
    for key, value in (neutral | {"attention.sliding_window": 0}).items():
        found = metadata.get(f"{kind}.{key}", value)
        if isinstance(found, list | np.ndarray) or found not in (value, 0):
            raise ValueError(f"{file}: {kind}.{key} is {_short(found)}, which this package does not support")
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{file}: tensor rope_freqs.weight scales the rotary frequencies, which is not supported")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file}: tensor token_embd.weight is missing: the file holds no language model")
    llm = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "width": size("embedding_length"),
        "num_layers": size("block_count"),
        "num_heads": size("attention.head_count"),
        "mlp_dim": size("feed_forward_length"),
    }
    llm["num_kv_heads"] = size("attention.head_count_kv", llm["num_heads"])
    llm["head_dim"] = size("attention.key_length", llm["width"] // llm["num_heads"] or None)
    llm["rope_theta"] = number("rope.freq_base", 10000.0)
    llm["epsilon"] = number("attention.layer_norm_rms_epsilon")
    llm["qkv_bias"] = ARCHITECTURES[kind]
    llm["tie_embeddings"] = "output.weight" not in tensors
    llm["context_length"] = size("context_length", 2048)
    for key, value in (
        ("vocab_size", llm["vocab_size"]),
        ("rope.dimension_count", llm["head_dim"]),
        ("attention.value_length", llm["head_dim"]),
    ):
        if size(key, value) != value:
            raise ValueError(f"{file}: {kind}.{key} is {size(key)}, the other sizes ask for {value}")
    if llm["num_layers"] > MAX_LAYERS:
        raise ValueError(f"{file}: {kind}.block_count is {llm['num_layers']}, more than {MAX_LAYERS}")
    if llm["num_heads"] % llm["num_kv_heads"] or llm["head_dim"] % 2:
        raise ValueError(
            f"{file}: {kind}.attention.head_count={llm['num_heads']} must be a multiple of head_count_kv="
            f"{llm['num_kv_heads']}, and the size of a head ({llm['head_dim']}) even"
        )
    return llm


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:100]


class _Cursor:
    """Reads a file from front to back; raises ValueError for a size that the rest of the file cannot hold."""

    def __init__(self, data: np.memmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> np.ndarray:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes at {self.at} reach beyond the end")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest: int) -> int:
        """Reads the number of items that follow, each of at least `smallest` bytes."""
        count = self.number("Q")
        if count * smallest > len(self.data) - self.at or count > MAX_ITEMS:
            raise ValueError(f"the count {count} at {self.at - 8} is more than the file holds")
        return count

    def string(self) -> str:
        return self.take(self.number("Q")).tobytes().decode()

    def value(self, kind: int) -> Any:
        """Reads a number, truth value or string, a list of strings, or an array of numbers."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"the metadata type {kind} at {self.at} is unknown")
        kind = self.number("I")
        if kind == STRING:
            return [self.string() for _ in range(self.count(8))]
        if kind not in SCALARS:
            raise ValueError(f"the list type {kind} at {self.at} is unknown")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        return self.take(self.count(dtype.itemsize) * dtype.itemsize).view(dtype)


def _read(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Reads metadata and tensors under the file's own names; rows are still permuted."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a .gguf file")
    try:
        cursor = _Cursor(np.memmap(file, np.uint8, "r"))
        if cursor.take(4).tobytes() != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        if (version := cursor.number("I")) not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3, little-endian")
        num_tensors = cursor.count(24)
        metadata: dict[str, Any] = {}
        for _ in range(cursor.count(13)):
            key = cursor.string()
            if key in metadata:
                raise ValueError(f"key {key} occurs twice")
            metadata[key] = cursor.value(cursor.number("I"))
        entries = [_entry(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {_short(alignment)}")
        cursor.at = -(-cursor.at // alignment) * alignment
        tensors = {name: _tensor(cursor, name, *entry) for name, *entry in entries}
        if len(tensors) != num_tensors:
            raise ValueError("two tensors have the same name")
    except ValueError as error:
        raise ValueError(f"{file} is no GGUF file, or is truncated or damaged ({error}): copy it again") from error
    return metadata, tensors


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads one row of the tensor table: name, shape in PyTorch's order, type number, offset in bytes."""
    name, num_dims = cursor.string(), cursor.number("I")
    if not 1 <= num_dims <= 4:
        raise ValueError(f"tensor {name[:100]} has {num_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


@functools.cache
def _is_supported(kind: int) -> bool:
    """Returns whether the package gguf can dequantise tensors of this type number."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[Kind(kind)][1]), np.uint8), Kind(kind))
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    if not _is_supported(kind):
        raise ValueError(f"tensor {name[:100]} has type {kind}, which the package gguf cannot dequantise")
    kind = Kind(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"tensor {name[:100]} has shape {shape}, {kind.name} comes in blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    start = cursor.at + offset
    if start + size > len(cursor.data):
        raise ValueError(f"tensor {name[:100]} of {size} bytes at {start} reaches beyond the end")
    data = cursor.data[start : start + size]
    data = data.view(PLAIN[kind][1]) if kind in PLAIN else data
    row = shape[-1] if kind in PLAIN else shape[-1] // block * block_bytes
    return GgufTensor(data.reshape(*shape[:-1], row), kind, shape)
