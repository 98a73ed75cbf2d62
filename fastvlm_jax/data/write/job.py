"""Runs one job of a write: the entries of some parts of a source become shards in the folder of unfinished work.

job-00003.json                       written last, when the job is done; lists its shards with checksums
job-00003-train-00000.array_record   records; the files beside it are described in shard.py
job-00003.rejected.jsonl             one [number, file, key, reason] a line
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastvlm_jax.data.index import Counter
from fastvlm_jax.data.readers import Options, Part, apart
from fastvlm_jax.data.record import Record, Rejected, check, pack
from fastvlm_jax.data.write.boxes import fitted
from fastvlm_jax.data.write.excluded import read_excluded
from fastvlm_jax.data.write.held_out import lead_of, limit_of, picture_hashes
from fastvlm_jax.data.write.shard import Shard, hash_of, intact, load_keys, load_pictures, save_keys, save_pictures
from fastvlm_jax.files import whole_file, write_whole
from fastvlm_jax.images.decode import decode, shrink, size_of
from fastvlm_jax.text.tokenizer import load_tokenizer

VALIDATION = "validation"
_REPORT_EVERY = 0.25  # seconds between reports


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds what is done to the records of a source.

    Attributes:
      split: split that the records go to.
      validation_share: fraction of the pictures that go to the split `validation` instead, with all their records; see
        held_out.py.
      max_side: longest side of an image, pixels; larger images are shrunk to it; 0 for no limit.
      quality: JPEG quality of images that are shrunk.
      verify: whether every image is decoded in full.
      shard_bytes: size, with its features, at which a shard ends, bytes; the record that reaches it is its last.
      tokenizer: file or folder of the tokenizer that counts tokens for the index; "" if they are not counted.
      template: template of conversations, as `data.template` in configs.
      turns: how turns become samples, as `data.turns` in configs.
      exclude: list of records that are left out, see excluded.py; "" if none are.
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
    exclude: str = ""

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


class JobShards:
    """Writes the records of a job to shards of their splits; each split has one open shard.

    Args:
      job: job that the records belong to.
      mark: text in the names of the shards, so that they can stand beside others of the same job.
    """

    def __init__(self, job: Job, mark: str = ""):
        self._job, self._prefix = job, f"{job.name}{mark}"
        self._open: dict[str, Shard] = {}  # by split, as all of these
        self._keys: dict[str, list[tuple[int, int]]] = {}
        self._pictures: dict[str, list[tuple[int, int]]] = {}
        self._done: list[dict[str, Any]] = []

    def add(self, number: int, record: Record, data: bytes, sizes=None, held_out: bool | None = None) -> None:
        """Adds a record to its split.

        Args:
          number: number of the entry in the job.
          record, data, sizes: see Shard.add.
          held_out: whether it goes to validation; None decides it by its own pictures alone.
        """
        settings = self._job.settings
        pictures = picture_hashes(record) if settings.validation_share else []
        if held_out is None:
            held_out = bool(pictures) and lead_of(pictures) < limit_of(settings.validation_share)
        split = VALIDATION if held_out else settings.split
        if split not in self._open:
            count = sum(shard["split"] == split for shard in self._done)
            name = f"{self._prefix}-{split}-{count:05d}.array_record"
            self._open[split] = Shard(pathlib.Path(self._job.folder) / name, settings.counter)
            self._keys[split], self._pictures[split] = [], []
        self._open[split].add(record, data, sizes)
        self._keys[split].append((hash_of(record.key.encode()), number))
        self._pictures[split] += [(number, picture) for picture in pictures]
        if self._open[split].bytes >= settings.shard_bytes:
            self._close(split)

    def close(self) -> list[dict[str, Any]]:
        """Closes all shards; returns the name and split of each, and what `Shard.close` tells of it."""
        for split in sorted(self._open):
            self._close(split)
        return self._done

    def abandon(self) -> None:
        """Deletes the unfinished shards."""
        for shard in self._open.values():
            shard.abandon()

    def _close(self, split: str) -> None:
        shard = self._open[split]
        self._done.append({"name": shard.path.name, "split": split, **shard.close()})
        del self._open[split]
        save_keys(shard.path, self._keys.pop(split))
        pictures = self._pictures.pop(split)
        if self._job.settings.validation_share:
            save_pictures(shard.path, pictures)


def run(job: Job, report: Callable[[int, int, int], None]) -> None:
    """Writes the shards of a job; calls `report(records, bytes, rejected)` with what was added since the last call.

    Raises:
      ValueError: a part cannot be read at all.
      OSError: a shard cannot be written, for example because the disk is full, or a part cannot be read any more.
    """
    folder, shards = pathlib.Path(job.folder), JobShards(job)
    firsts: list[tuple[str, int]] = []  # file of each part and number of its first entry
    try:
        with whole_file(folder / f"{job.name}.rejected.jsonl", "w") as rejected:
            for number, entry in _reported(_entries(job, firsts), report):
                if isinstance(entry, Rejected):
                    rejected.write(json.dumps([number, *entry]) + "\n")
                else:
                    shards.add(number, *entry)
            done = shards.close()
    finally:
        shards.abandon()
    counter = job.settings.counter and job.settings.counter.id
    save_result(job, {"shards": done, "firsts": firsts, "counter": counter, "duplicates": []})


def save_result(job: Job, result: dict[str, Any]) -> None:
    """Records what a job did; it counts as done from then on."""
    write_whole(pathlib.Path(job.folder) / f"{job.name}.json", json.dumps(result).encode())


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
            whole &= intact(path, shard) and len(load_keys(path)) == shard["records"]
            whole &= not job.settings.validation_share or len(load_pictures(path)) >= shard["records"]
            whole &= any((folder / "index").glob(f"{path.name}.sizes.*"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole else None


def _entries(job: Job, firsts: list[tuple[str, int]]) -> Iterator[tuple[int, Any]]:
    """Yields (number, Rejected or a record ready to write) for each entry, and adds each part to `firsts`."""
    number = 0
    for part in job.parts:
        firsts.append((part.path, number))
        entries = apart.entries(job.format, part, job.options)
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
    """Checks a record and shrinks its images; returns it with its packed bytes and its images' (width, height).

    The boxes of its augmentations are scaled as its picture is.
    """
    if settings.exclude and (reason := read_excluded(settings.exclude).get(record.key)):
        return Rejected(file, record.key, reason)
    if reason := check(record):
        return Rejected(file, record.key, reason)
    images, sizes = [], []
    for number, image in enumerate(record.images):
        try:
            size = whole = size_of(image)
            if settings.verify:
                decode(image)
            if settings.max_side and max(size) > settings.max_side:
                image = shrink(image, settings.max_side, settings.quality)
                size = size_of(image)
            if len(record.images) == 1:
                record = fitted(record, whole, size)
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
