"""Reads language models in GGUF, llama.cpp's file format; gguf_export.py writes them.

gguf_file.py reads header, metadata and tensor table, text/gguf.py the tokenizer; the package `gguf` dequantises.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from fastvlm_jax.convert.layouts.text_config import MAX_SIZE
from fastvlm_jax.convert.mapping import MAX_LAYERS, Row, described, to_jax
from fastvlm_jax.convert.recognise import gguf_file
from fastvlm_jax.convert.tables.gguf import ARCHITECTURES, gguf_rows, permuted_heads
from fastvlm_jax.gguf_file import damaged, read_contents, short
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.text.gguf import read_gguf_tokenizer

__all__ = ["GgufTensor", "read", "read_gguf", "read_gguf_tokenizer"]

PLAIN = {Kind.F32: ("F32", np.float32), Kind.F16: ("F16", np.float16), Kind.BF16: ("BF16", ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """Describes a stored tensor that is dequantised when it is indexed, with the interface of a safetensors slice.

    Attributes:
      data: memory-mapped array: plain numbers in PyTorch's shape, or [..., bytes] of quantised rows.
      kind: type of the stored numbers, plain or quantised.
      shape: sizes in PyTorch's order.
      heads: number of heads of a query or key matrix whose rows are permuted, see `permuted_heads`; else 0.
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
            stored = np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
            data = self.data[stored[rows]]
        else:
            data = self.data[rows]
        return data if self.kind in PLAIN else gguf.dequantize(np.ascontiguousarray(data), self.kind)


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a GGUF file, or the one in a folder: ({"llm": ..., "dtype": ...}, variables as Leaves).

    Raises:
      FileNotFoundError: there is no such file.
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
    decoder = Decoder(**llm)
    rows = gguf_rows(decoder, path)
    names = {name for row in rows for name in row.names()}
    if differing := sorted(names ^ set(tensors)):
        state = "is not part of this architecture" if differing[0] in tensors else "is missing"
        raise ValueError(f"{file}: tensor {differing[0]} {state} ({len(differing)} differ)")
    for name, heads in permuted_heads(decoder).items():
        if (found := tensors[name].shape[0]) != heads * llm["head_dim"]:
            raise ValueError(f"{file}: tensor {name} has {found} rows, which do not match {heads} heads")
        tensors[name] = dataclasses.replace(tensors[name], heads=heads)
    return llm, rows, tensors


def _decoder_args(file: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"{file}: general.architecture is {kind!r}, this package reads {' and '.join(ARCHITECTURES)}")

    def size(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{kind}.{key}", default)
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise ValueError(f"{file}: {kind}.{key} is {short(value)}, it must be a whole number from 1 to 2**31 - 1")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{kind}.{key}", default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{file}: {kind}.{key} is {short(value)}, it must be a positive number")
        return float(str(np.float32(value)))  # 1e-5, not its exact float32 value 9.999999747e-06

    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "expert_count": 0}
    for key, value in (neutral | {"attention.sliding_window": 0}).items():
        found = metadata.get(f"{kind}.{key}", value)
        if isinstance(found, list | np.ndarray) or found not in (value, 0):
            raise ValueError(f"{file}: {kind}.{key} is {short(found)}, which this package does not support")
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


def _read(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Reads metadata and tensors under the file's own names; rows are still permuted."""
    contents = read_contents(file)
    try:
        tensors = {name: _tensor(contents.data, name, *x) for name, x in contents.tensors.items()}
        # Otherwise a small file could be a model of any size, each layer of which lies in the same place.
        places = sorted((start, name) for name, (_, _, start) in contents.tensors.items())
        for (first, name), (second, other) in itertools.pairwise(places):
            if second < first + tensors[name].data.nbytes:
                raise ValueError(f"the tensors {name[:100]} and {other[:100]} lie in the same place")
        return contents.metadata, tensors
    except ValueError as error:
        raise damaged(file, error) from error


@functools.cache
def _is_supported(kind: int) -> bool:
    """Returns whether the package gguf can dequantise tensors of this type number."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[Kind(kind)][1]), np.uint8), Kind(kind))
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def _tensor(data: np.memmap, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    if not _is_supported(kind):
        raise ValueError(f"tensor {name[:100]} has type {kind}, which the package gguf cannot dequantise")
    kind = Kind(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"tensor {name[:100]} has shape {shape}, {kind.name} comes in blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if start + size > len(data):
        raise ValueError(f"tensor {name[:100]} of {size} bytes at {start} reaches beyond the end")
    data = data[start : start + size]
    data = data.view(PLAIN[kind][1]) if kind in PLAIN else data
    row = shape[-1] if kind in PLAIN else shape[-1] // block * block_bytes
    return GgufTensor(data.reshape(*shape[:-1], row), kind, shape)
