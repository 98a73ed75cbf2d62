"""Runs one job of a write: the entries of some parts of a source become shards in the folder of unfinished work.

job-00003.json                             written last, when the job is done; lists its shards with checksums
job-00003-train-00000.array_record         records
job-00003-train-00000.array_record.keys    uint64 [records, 2]: hash of the key, number of the entry in the job
index/job-00003-train-00000.array_record.* sizes and token counts
job-00003.rejected.jsonl                   one [number, file, key, reason] a line
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from fastvlm_jax.data.index import Counter, ShardIndex
from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.recognise import reader
from fastvlm_jax.data.record import Record, Rejected, check, pack
from fastvlm_jax.files import put_in_place, sha256, whole_file, write_whole
from fastvlm_jax.images.decode import decode, shrink, size_of
from fastvlm_jax.text.tokenizer import load_tokenizer

VALIDATION = "validation"
_REPORT_EVERY = 0.25  # seconds between reports


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds what is done to the records of a source.

    Attributes:
      split: split that the records go to.
      validation_share: fraction of records that go to the split `validation` instead, chosen by a hash of the key.
      max_side: longest side of an image, pixels; larger images are shrunk to it; 0 for no limit.
      quality: JPEG quality of images that are shrunk.
      verify: whether every image is decoded in full.
      shard_bytes: size at which a shard ends, bytes; the record that reaches it is its last.
      tokenizer: file or folder of the tokenizer that counts tokens for the index; "" if they are not counted.
      template: template of conversations, as `data.template` in configs.
      turns: how turns become samples, as `data.turns` in configs.
    """

    split: str = "train"
    validation_share: float = 0.0
    max_side: int = 0
    quality: int = 92
    verify: bool = False
    shard_bytes: int = 256 << 20
    tokenizer: str = ""
    template: str = "qwen_2"
    turns: str = "conversation"

    @property
    def counter(self) -> Counter | None:
        """Returns the counter of tokens, None without a tokenizer.

        Raises:
          FileNotFoundError: the tokenizer does not exist.
          ValueError: the tokenizer cannot be read.
        """
        return _counter(self.tokenizer, self.template, self.turns) if self.tokenizer else None


@functools.lru_cache(maxsize=2)
def _counter(tokenizer: str, template: str, turns: str) -> Counter:
    return Counter(load_tokenizer(tokenizer), template, turns)


@dataclasses.dataclass(frozen=True)
class Job:
    """Describes one job: consecutive parts of a source, and the folder that their shards go to."""

    number: int
    format: str
    parts: tuple[Part, ...]
    options: Options
    settings: Settings
    folder: str

    @property
    def name(self) -> str:
        return f"job-{self.number:05d}"


class Shard:
    """Writes a shard and its index; both get their names only when they are complete.

    Attributes:
      path: name of the finished shard.
      bytes: size of the records so far.
    """

    def __init__(self, path: pathlib.Path, counter: Counter | None = None):
        self.path, self.bytes = path, 0
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._records = self._images = 0
        self._index = ShardIndex(counter)
        # One record a group, so that random access reads no other record.
        self._writer = _as_os_error(path, lambda: ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed"))

    def add(self, record: Record, data: bytes, sizes: list[tuple[int, int]] | None = None) -> None:
        """Adds a record, packed as `data`; `sizes` are the (width, height) of its images, if they are known."""
        _as_os_error(self.path, lambda: self._writer.write(data))
        self._index.add(record, sizes)
        self._records += 1
        self._images += len(record.images)
        self.bytes += len(data)

    def close(self) -> dict[str, Any]:
        """Puts the shard and its index in place; returns its numbers of records, images and bytes, and its sha256."""
        _as_os_error(self.path, self._writer.close)
        self._index.save(self.path)
        result = {"records": self._records, "images": self._images, "bytes": self._partial.stat().st_size}
        result["sha256"] = sha256(self._partial)
        put_in_place(self._partial, self.path)
        return result

    def abandon(self) -> None:
        """Deletes the unfinished shard."""
        with contextlib.suppress(Exception):  # the error that led here is already on its way
            self._writer.close()
        self._partial.unlink(missing_ok=True)


def _as_os_error(path: pathlib.Path, action: Callable) -> Any:
    """Calls `action` of the shard writer, and turns its RuntimeErrors of many lines into an OSError of one line."""
    try:
        return action()
    except (RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise OSError(f"{path} cannot be written: {line}"[:300]) from error


def hash_of(key: str) -> int:
    """Returns a hash of a key, eight bytes as an integer."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def run(job: Job, report: Callable[[int, int, int], None]) -> None:
    """Writes the shards of a job; calls `report(records, bytes, rejected)` with what was added since the last call.

    Raises:
      ValueError: a part cannot be read at all.
      OSError: a shard cannot be written, for example because the disk is full, or a part cannot be read any more.
    """
    folder = pathlib.Path(job.folder)
    shards: dict[str, Shard] = {}  # the open shard of each split
    done: list[dict[str, Any]] = []
    keys: dict[str, list[tuple[int, int]]] = {}
    firsts: list[tuple[str, int]] = []  # file of each part and number of its first entry

    def close(split: str) -> None:
        shard = shards.pop(split)
        done.append({"name": shard.path.name, "split": split, **shard.close()})
        save_keys(shard.path, keys.pop(split))

    try:
        with whole_file(folder / f"{job.name}.rejected.jsonl", "w") as rejected:
            for number, entry in _reported(_entries(job, firsts), report):
                if isinstance(entry, Rejected):
                    rejected.write(json.dumps([number, *entry]) + "\n")
                    continue
                record, data, sizes = entry
                split, hashed = _split_and_hash(record.key, job.settings)
                if split not in shards:
                    count = sum(shard["split"] == split for shard in done)
                    name = f"{job.name}-{split}-{count:05d}.array_record"
                    shards[split], keys[split] = Shard(folder / name, job.settings.counter), []
                shards[split].add(record, data, sizes)
                keys[split].append((hashed, number))
                if shards[split].bytes >= job.settings.shard_bytes:
                    close(split)
            for split in sorted(shards):
                close(split)
    finally:
        for shard in shards.values():
            shard.abandon()
    counter = job.settings.counter and job.settings.counter.id
    result = {"shards": done, "firsts": firsts, "counter": counter, "duplicates": []}
    write_whole(folder / f"{job.name}.json", json.dumps(result).encode())


def save_keys(shard: pathlib.Path, keys: list[tuple[int, int]]) -> None:
    """Writes the (hash of the key, number of the entry) of each record of a shard, to the file beside it."""
    write_whole(shard.with_name(shard.name + ".keys"), np.array(keys, "<u8").reshape(-1, 2).tobytes())


def load_keys(shard: pathlib.Path) -> np.ndarray:
    """Reads what `save_keys` wrote: uint64 [records, 2]."""
    return np.frombuffer(shard.with_name(shard.name + ".keys").read_bytes(), "<u8").reshape(-1, 2)


def read_result(job: Job) -> dict[str, Any]:
    """Reads what a job recorded when it was done: its shards with their checksums, and its parts."""
    return json.loads((pathlib.Path(job.folder) / f"{job.name}.json").read_bytes())


def finished(job: Job) -> dict[str, Any] | None:
    """Returns what the finished job recorded, if its files are there and intact; None if the job must be run."""
    folder = pathlib.Path(job.folder)
    try:
        result = read_result(job)
        whole = (folder / f"{job.name}.rejected.jsonl").is_file()
        whole &= result["counter"] == (job.settings.counter and job.settings.counter.id)
        for shard in result["shards"]:
            path = folder / shard["name"]
            whole &= path.stat().st_size == shard["bytes"] and sha256(path) == shard["sha256"]
            whole &= len(load_keys(path)) == shard["records"]
            whole &= any((folder / "index").glob(f"{path.name}.sizes.*"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole else None


def _split_and_hash(key: str, settings: Settings) -> tuple[str, int]:
    hashed = hash_of(key)
    return (VALIDATION if hashed < settings.validation_share * 2**64 else settings.split), hashed


def _entries(job: Job, firsts: list[tuple[str, int]]) -> Iterator[tuple[int, Any]]:
    """Yields (number, Rejected or a record ready to write) for each entry, and adds each part to `firsts`."""
    read, number = reader(job.format).read, 0
    for part in job.parts:
        firsts.append((part.path, number))
        entries = read(part, job.options)
        while True:
            try:
                entry = next(entries, None)
            except OSError as error:
                raise OSError(f"{part.path} cannot be read any more: {error}") from error
            except Exception as error:
                raise ValueError(f"{part.path} cannot be read: {type(error).__name__} {error}"[:300]) from error
            if entry is None:
                break
            yield number, entry if isinstance(entry, Rejected) else _prepare(entry, part.path, job.settings)
            number += 1


def _prepare(record: Record, file: str, settings: Settings) -> Rejected | tuple[Record, bytes, list[tuple[int, int]]]:
    """Checks a record and shrinks its images; returns it with its packed bytes and its images' (width, height)."""
    if reason := check(record):
        return Rejected(file, record.key, reason)
    images, sizes = [], []
    for number, image in enumerate(record.images):
        try:
            size = size_of(image)
            if settings.verify:
                decode(image)
            if settings.max_side and max(size) > settings.max_side:
                image = shrink(image, settings.max_side, settings.quality)
                size = size_of(image)
        except ValueError as error:
            which = f"image {number}: " if len(record.images) > 1 else ""
            return Rejected(file, record.key, f"{which}{error}")
        images.append(image)
        sizes.append(size)
    record = dataclasses.replace(record, images=tuple(images))
    try:
        return record, pack(record), sizes
    except (ValueError, TypeError, OverflowError) as error:
        return Rejected(file, ascii(record.key), f"it cannot be stored: {error}")


def _reported(entries: Iterator[tuple[int, Any]], report: Callable[[int, int, int], None]) -> Iterator:
    """Yields the entries as they are, and reports their counts at intervals and at the end."""
    counts, last = [0, 0, 0], time.monotonic()
    for number, entry in entries:
        yield number, entry
        if isinstance(entry, Rejected):
            counts[2] += 1
        else:
            counts[0] += 1
            counts[1] += len(entry[1])
        if time.monotonic() - last > _REPORT_EVERY:
            report(*counts)
            counts, last = [0, 0, 0], time.monotonic()
    report(*counts)
