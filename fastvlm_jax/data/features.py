"""Reads the features of teachers from the file beside each shard, so that a visit reads the rows that it uses alone.

    train-00000-of-00004.array_record            record 7 holds "image": {"dtype": "float32", "shape": [30, 1536],
                                                 "row": 252, "crc32": 30 x 4 bytes}, and "text" likewise, from row 282
    train-00000-of-00004.array_record.features   rows of a fixed stride, here of 1536 float32 numbers, little-endian:
                                                 252 to 281 are those of its augmentations, 282 to 287 of its captions

The first features of a shard fix the type and the width of its rows, so that the file is one array [rows, width]. What
has another type or width stays in its record, as "data" in place of "row" and "crc32", and so do all features in data
sets of earlier versions. A record holds a checksum of each of its rows, so that no damaged row, and none of another
shard, is taken for one of its own.
"""

import dataclasses
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fastvlm_jax.data.record import Record

SUFFIX = ".features"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_MAX_ROW = 1 << 40  # more than any file has


class Features(NamedTuple):
    """Describes features of a record: a row for each augmentation, or for each caption.

    Attributes:
      dtype: type of the numbers.
      rows: number of rows.
      width: numbers in a row.
      data: the rows themselves; None if they lie in the file beside the shard.
      row: number of the first row in that file.
      crc32: checksums of the rows in that file, 4 bytes each.
    """

    dtype: np.dtype
    rows: int
    width: int
    data: bytes | None
    row: int = 0
    crc32: bytes = b""

    @property
    def stride(self) -> int:
        """Returns the size of a row in bytes."""
        return self.width * self.dtype.itemsize


def beside(shard: os.PathLike | str) -> str:
    """Returns the path of the file of features beside a shard."""
    return os.fspath(shard) + SUFFIX


def describe(stored: Any, name: str) -> Features:
    """Returns what a record tells of its features `name`.

    Raises:
      ValueError: it tells of none; the message is a short line.
    """
    try:
        dtype, shape = DTYPES.get(stored["dtype"]), tuple(int(side) for side in stored["shape"])
        data, row, crc32 = stored.get("data"), stored.get("row"), stored.get("crc32")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"the {name} features of its teachers are not an array") from error
    if dtype is None:
        raise ValueError(f"{name} features of type {stored['dtype']}, not float16, float32 or bfloat16")
    rows = len(shape) == 2 and min(shape) >= 0
    if isinstance(data, bytes):
        if not rows or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{name} features of the shape {list(shape)} in {len(data)} bytes")
        return Features(dtype, *shape, data)
    placed = type(row) is int and 0 <= row < _MAX_ROW and isinstance(crc32, bytes)
    if not rows or not placed or len(crc32) != 4 * shape[0]:
        raise ValueError(f"the {name} features of its teachers are not an array")
    return Features(dtype, *shape, None, row, crc32)


def checksum(row: bytes) -> bytes:
    """Returns the CRC-32 of a row, 4 bytes."""
    return zlib.crc32(row).to_bytes(4, "little")


def read_rows(wanted: Sequence[tuple[Features, Sequence[int]]], path: str) -> list[np.ndarray]:
    """Returns rows of each of some features of a record, [number of its rows, width], as they are stored.

    It holds no file open between two calls, so that threads and forked processes may read at once.

    Args:
      wanted: features, and the numbers of the rows to read of them.
      path: file beside the record's shard, local or in a bucket; it need not be there if no row lies in it.

    Raises:
      ValueError: the file is missing, damaged or of another shard; the message names it.
    """
    places = [
        ((features.row + row) * features.stride, features.stride)
        for features, rows in wanted
        if features.data is None
        for row in rows
    ]
    found = iter(_read(path, places) if places else ())
    return [_array(features, rows, found, path) for features, rows in wanted]


def _array(features: Features, rows: Sequence[int], found: Iterator[bytes], path: str) -> np.ndarray:
    """Returns rows of features; those beside the shard are the next ones of `found`."""
    taken, stride = [], features.stride
    for row in rows:
        if features.data is not None:
            taken.append(features.data[row * stride : (row + 1) * stride])
            continue
        taken.append(next(found))
        if checksum(taken[-1]) != features.crc32[4 * row : 4 * row + 4]:
            raise ValueError(f"{path} is damaged or belongs to another shard: write the data set again")
    return np.frombuffer(b"".join(taken), features.dtype).reshape(len(rows), features.width)


def _read(path: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of a file at each (start, size); fewer where the file ends before."""
    try:
        if "://" in path:
            import fsspec

            starts = [start for start, _ in places]
            ends = [start + size for start, size in places]
            filesystem = fsspec.filesystem(path.split("://")[0])  # one a process, made anew behind a fork
            return filesystem.cat_ranges([path] * len(places), starts, ends, on_error="raise")
        with open(path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            return [os.pread(file.fileno(), min(size, length), start) for start, size in places]
    except Exception as error:  # a bucket's client raises a dozen kinds
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read ({reason}): write the data set again") from error


def whole(record: Record, path: str) -> Record:
    """Returns a record that holds all of its features itself; `path` is the file beside its shard.

    Raises:
      ValueError: see `read_rows`.
    """
    teacher = record.extra.get("teacher")
    if not isinstance(teacher, dict) or not any(map(is_beside, teacher.values())):
        return record
    joined = dict(teacher)
    for name, stored in teacher.items():
        if is_beside(stored):
            features = describe(stored, name)
            (rows,) = read_rows([(features, range(features.rows))], path)
            joined[name] = {"dtype": stored["dtype"], "shape": stored["shape"], "data": rows.tobytes()}
    return dataclasses.replace(record, extra=record.extra | {"teacher": joined})


def is_beside(stored: Any) -> bool:
    """Returns whether a record tells of features that lie beside its shard."""
    return isinstance(stored, dict) and "crc32" in stored
