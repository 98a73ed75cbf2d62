"""Reads header, metadata and tensor table of GGUF, llama.cpp's file format (versions 2 and 3).

Every size is checked against the file before it is used.
Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from fastvlm_jax.files import refuse_pointer

SCALARS = dict(enumerate((*"BbHhIi", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}  # GGUF type number -> struct code
STRING, ARRAY = 8, 9  # GGUF type numbers
MAX_ITEMS = 2**22  # tensors, metadata keys or items of one list: beyond any real model


class Contents(NamedTuple):
    """Holds what a GGUF file says, and its bytes.

    Attributes:
      metadata: value of each key: a number, truth value, string, list of strings or array of numbers.
      tensors: name -> (shape in PyTorch's order, type number, offset in the file).
      data: the whole file, uint8, memory-mapped.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    data: np.memmap


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


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads one row of the tensor table: name, shape in PyTorch's order, type number, offset in bytes."""
    name, num_dims = cursor.string(), cursor.number("I")
    if not 1 <= num_dims <= 4:
        raise ValueError(f"tensor {name[:100]} has {num_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def read_contents(file: pathlib.Path) -> Contents:
    """Reads all but the tensors' values.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a whole GGUF file; the message names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a .gguf file, or a folder with one")
    refuse_pointer(file)
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
            raise ValueError(f"general.alignment is {short(alignment)}")
        start = -(-cursor.at // alignment) * alignment
        tensors = {name: (shape, kind, start + offset) for name, shape, kind, offset in entries}
        if len(tensors) != num_tensors:
            raise ValueError("two tensors have the same name")
    except ValueError as error:
        raise damaged(file, error) from error
    return Contents(metadata, tensors, cursor.data)


def damaged(file: pathlib.Path, error: ValueError) -> ValueError:
    """Returns the error that names a file which is not a whole GGUF file."""
    return ValueError(f"{file} is no GGUF file, or is truncated or damaged ({error}): copy it again")


def short(value: Any) -> str:
    """Returns a metadata value as messages show it."""
    return f"a list of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:100]
