"""Writes one shard, and the small files beside it that a write needs until it is finished.

job-00003-train-00000.array_record           records
job-00003-train-00000.array_record.features  their teachers' features, see features.py; it stays beside the shard
job-00003-train-00000.array_record.keys      uint64 [records, 2]: hash of the key, number of the entry in the job
job-00003-train-00000.array_record.pictures  uint64 [pictures, 2]: number of the entry, hash of one of its pictures
index/job-00003-train-00000.array_record.*   sizes and token counts
"""

import contextlib
import hashlib
import pathlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fastvlm_jax.data.features import beside, whole
from fastvlm_jax.data.index import Counter, ShardIndex
from fastvlm_jax.data.record import Record, pack, unpack
from fastvlm_jax.data.write.features import FeaturesFile
from fastvlm_jax.files import put_in_place, sha256, write_whole


class Shard:
    """Writes a shard, its index and the features beside it; all get their names only when they are complete.

    Attributes:
      path: name of the finished shard.
      bytes: size of the records so far, with their features.
    """

    def __init__(self, path: pathlib.Path, counter: Counter | None = None):
        self.path, self.bytes = path, 0
        # By chance: process numbers repeat, on other hosts that share the folder or in other containers.
        self._partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        self._records = self._images = 0
        self._index, self._features = ShardIndex(counter), FeaturesFile(path)
        # One record a group, so that random access reads no other record.
        self._writer = _as_os_error(path, lambda: ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed"))

    def add(self, record: Record, data: bytes, sizes: list[tuple[int, int]] | None = None) -> None:
        """Adds a record.

        Args:
          record: record that holds its features itself.
          data: the record, packed.
          sizes: (width, height) of its images, if they are known.

        Raises:
          ValueError: its features lie beside another shard.
        """
        kept = self._features.add(record)
        stored = data if kept is record else pack(kept)
        _as_os_error(self.path, lambda: self._writer.write(stored))
        self._index.add(record, sizes)
        self._records += 1
        self._images += len(record.images)
        self.bytes += len(data)

    def close(self) -> dict[str, Any]:
        """Puts all files in place.

        Returns:
          {"records", "images", "bytes", "sha256"} of the shard and, if there are features beside it, "features": the
          "bytes" and "sha256" of their file.
        """
        _as_os_error(self.path, self._writer.close)
        self._index.save(self.path)
        features = self._features.close()
        result = {"records": self._records, "images": self._images, "bytes": self._partial.stat().st_size}
        result["sha256"] = sha256(self._partial)
        put_in_place(self._partial, self.path)
        return result | features

    def abandon(self) -> None:
        """Deletes the unfinished shard."""
        with contextlib.suppress(Exception):  # the error that led here is already on its way
            self._writer.close()
        self._partial.unlink(missing_ok=True)
        self._features.abandon()


def _as_os_error(path: pathlib.Path, action: Callable) -> Any:
    """Calls `action` of the shard writer, and turns its RuntimeErrors of many lines into an OSError of one line."""
    try:
        return action()
    except (RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise OSError(f"{path} cannot be written: {line}"[:300]) from error


def intact(shard: pathlib.Path, written: dict[str, Any]) -> bool:
    """Returns whether a shard and the features beside it are there, and as `Shard.close` told when they were written.

    Raises:
      OSError: one of them cannot be read.
    """
    files = {shard: written}
    if "features" in written:
        files[pathlib.Path(beside(shard))] = written["features"]
    return all(file.stat().st_size == told["bytes"] and sha256(file) == told["sha256"] for file, told in files.items())


def read_record(reader: ArrayRecordReader, shard: pathlib.Path, row: int) -> tuple[Record, bytes]:
    """Returns a record of a shard, with its features in it, and packed."""
    (data,) = reader.read([row])
    record = unpack(data)
    held = whole(record, beside(shard))
    return held, data if held is record else pack(held)


def hash_of(data: bytes) -> int:
    """Returns a hash of `data`, eight bytes as an integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def save_keys(shard: pathlib.Path, keys: Sequence[tuple[int, int]]) -> None:
    """Writes the (hash of the key, number of the entry) of each record of a shard, to the file beside it."""
    _save(shard, ".keys", keys)


def load_keys(shard: pathlib.Path) -> np.ndarray:
    """Reads what `save_keys` wrote: uint64 [records, 2]."""
    return _load(shard, ".keys")


def save_pictures(shard: pathlib.Path, pictures: Sequence[tuple[int, int]]) -> None:
    """Writes (number of the entry, hash of a picture) for each picture of a shard's records, to the file beside it."""
    _save(shard, ".pictures", pictures)


def load_pictures(shard: pathlib.Path) -> np.ndarray:
    """Reads what `save_pictures` wrote: uint64 [pictures, 2]."""
    return _load(shard, ".pictures")


def _save(shard: pathlib.Path, suffix: str, rows: Sequence[tuple[int, int]]) -> None:
    write_whole(shard.with_name(shard.name + suffix), np.array(rows, "<u8").reshape(-1, 2).tobytes())


def _load(shard: pathlib.Path, suffix: str) -> np.ndarray:
    return np.frombuffer(shard.with_name(shard.name + suffix).read_bytes(), "<u8").reshape(-1, 2)
