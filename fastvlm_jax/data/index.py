"""The index of a data set: image sizes and text lengths, so that the schedule need not read the records.

Each shard has two small index files beside it, written with the data set or when it is first used:

    index/train-00000-of-00004.sizes.npz             images of each record, width and height of each image
    index/train-00000-of-00004.tokens-1f0c9a33.npz   tokens of each text, for one tokenizer, template and `turns`
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import tqdm
from absl import logging
from etils import epath

from fastvlm_jax.data.record import Record, check
from fastvlm_jax.data.sources import RecordSource, read_shards
from fastvlm_jax.files import cache_folder, load_arrays, save_arrays
from fastvlm_jax.images.decode import size_of
from fastvlm_jax.text.conversation import TEMPLATES, Turn, questions, render, shortened
from fastvlm_jax.text.tokenizer import Tokenizer
from fastvlm_jax.text.tokenizer_config import changes

TURNS = ("separate", "conversation")
FOLDER = "index"
_VERSION = 2  # version of the index files and of how tokens are counted
_ALONE = 4096  # most records that are counted without starting other processes


@dataclasses.dataclass(frozen=True)
class Counter:
    """Counts the tokens of a record's texts.

    Attributes:
      tokenizer: tokenizer of the texts, see text/tokenizer.py.
      template: name of a template in conversation.TEMPLATES.
      turns: "separate" (a segment for each question) or "conversation" (one for each record), see `talks_of`.
    """

    tokenizer: Tokenizer
    template: str
    turns: str

    def __post_init__(self):
        if self.turns not in TURNS:
            raise ValueError(f"unknown data.turns {self.turns!r}: choose one of {', '.join(TURNS)}")
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown data.template {self.template!r}: choose one of {', '.join(TEMPLATES)}")

    @functools.cached_property
    def id(self) -> str:
        """Returns eight hexadecimal digits that identify the tokenizer, the template and `turns`."""
        digest = hashlib.sha256(f"{_VERSION} {TEMPLATES[self.template]} {self.turns}".encode())
        for file in self.tokenizer.files:
            digest.update(file.read_bytes())
        digest.update(changes(self.tokenizer.config).encode())
        return digest.hexdigest()[:8]

    def count(self, record: Record) -> list[tuple[int, int, tuple[int, ...]]]:
        """Returns (text tokens, text tokens of the newest question and answer alone, images named) of each segment.

        Raises:
          ValueError: the record cannot be used for training; the message says why.
        """
        counted = []
        for talk in talks_of(record, self.turns):
            length, last = self._length(talk), newest(talk)
            counted.append((length, length if last is talk else self._length(last), tuple(images_named(talk))))
        return counted

    def _length(self, talk: tuple[Turn, ...]) -> int:
        segment = render(talk, self.tokenizer, TEMPLATES[self.template], 0)
        if not segment.loss_mask[1:].any():
            raise ValueError("none of its tokens is supervised")
        return len(segment.tokens)


def talks_of(record: Record, turns: str) -> list[tuple[Turn, ...]]:
    """Returns the conversations that become segments: each question alone ("separate"), or all turns together.

    Raises:
      ValueError: the record cannot be used for training; the message says why.
    """
    if reason := check(record):
        raise ValueError(reason)
    return questions(record.turns) if turns == "separate" else [tuple(record.turns)]


def images_named(talk: tuple[Turn, ...]) -> list[int]:
    """Returns the images that a conversation names, in order and with repeats."""
    return [part for _, content in talk for part in content if isinstance(part, int)]


def newest(talk: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns a conversation reduced to its newest question and answer, with the images of the dropped questions."""
    return collections.deque(itertools.chain([talk], shortened(talk)), maxlen=1)[0]


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """Holds the image sizes and text lengths of M records with I images and S segments, which name images R times.

    Attributes:
      num_images: int [M], images of each record.
      width, height: uint16 [I], size of each image after EXIF rotation, pixels; record after record.
      num_segments: int [M], segments of each record.
      text: int32 [S], text tokens of each segment.
      shortest: int32 [S], text tokens of the newest question and answer of each segment.
      num_refs: int [S], images that each segment names, repeats included.
      refs: uint16 [R], index of each named image in its record; segment after segment.
      unusable: record number -> why the record cannot be used; such a record has no segments.
    """

    num_images: np.ndarray
    width: np.ndarray
    height: np.ndarray
    num_segments: np.ndarray
    text: np.ndarray
    shortest: np.ndarray
    num_refs: np.ndarray
    refs: np.ndarray
    unusable: dict[int, str]

    def __len__(self) -> int:
        return len(self.num_images)


_SIZES = {"num_images": np.uint16, "width": np.uint16, "height": np.uint16}
_TOKENS = {
    "num_segments": np.uint16, "text": np.int32, "shortest": np.int32, "num_refs": np.uint16, "refs": np.uint16
}  # fmt: skip


class ShardIndex:
    """Collects the image sizes and text lengths of one shard's records, in order, and writes its two index files.

    Without a counter it collects the image sizes only.
    """

    def __init__(self, counter: Counter | None = None):
        self._counter = counter
        self._columns: dict[str, list[int]] = {name: [] for name in (*_SIZES, *_TOKENS)}
        self._unusable: dict[int, str] = {}

    def add(self, record: Record, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Adds the next record; `sizes` are the (width, height) of its images, if the caller knows them already."""
        columns, number = self._columns, len(self._columns["num_images"])
        counted, reason = [], None
        try:
            sizes = [size_of(image) for image in record.images] if sizes is None else sizes
            if self._counter is not None:
                counted = self._counter.count(record)
        except ValueError as error:
            reason = str(error)
            if sizes is None:
                sizes = [(1, 1)] * len(record.images)
        columns["num_images"].append(len(record.images))
        columns["width"] += [width for width, _ in sizes]
        columns["height"] += [height for _, height in sizes]
        columns["num_segments"].append(len(counted))
        for text, shortest, refs in counted:
            columns["text"].append(text)
            columns["shortest"].append(shortest)
            columns["num_refs"].append(len(refs))
            columns["refs"] += refs
        if reason is not None:
            self._unusable[number] = reason[:200]

    def add_unusable(self, reason: str) -> None:
        """Adds the next record as one that cannot be read; `reason` says why."""
        self._unusable[len(self._columns["num_images"])] = reason[:200]
        for name in ("num_images", "num_segments"):
            self._columns[name].append(0)

    def save(self, shard: os.PathLike, folder: os.PathLike | None = None) -> None:
        """Writes the index files of `shard`, each atomically, to `folder` (default: the folder `index` beside it)."""
        shard = pathlib.Path(shard)
        folder = shard.parent / FOLDER if folder is None else pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {"sizes": _SIZES} | ({f"tokens-{self._counter.id}": _TOKENS} if self._counter else {})
        for kind, columns in kinds.items():
            arrays = {name: np.array(self._columns[name], dtype) for name, dtype in columns.items()}
            if columns is _TOKENS:
                arrays["unusable"] = np.array(list(self._unusable), np.int64)
                arrays["reasons"] = np.array(list(self._unusable.values()), "U200")
            path = folder / f"{shard.name}.{kind}.npz"
            save_arrays(path, arrays)


def load_index(source: RecordSource, counter: Counter) -> RecordIndex:
    """Returns the index of a split; missing index files are first computed, on all cores, and saved.

    They are saved beside the shards, or in the user's cache folder if the data set's folder is not writable.

    Raises:
      ValueError: a shard or an index file is damaged.
    """
    beside = source.folder / FOLDER
    local = cache_folder() / FOLDER / source.fingerprint[:16]
    names = {shard: [f"{shard.name}.sizes.npz", f"{shard.name}.tokens-{counter.id}.npz"] for shard in source.shards}
    present, present_here = names_in(beside), names_in(local)
    missing = [shard for shard, files in names.items() if not set(files) <= present | present_here]
    if missing:
        writable = "://" not in os.fspath(source.folder) and os.access(source.folder, os.W_OK)
        _count_shards(source, missing, counter, pathlib.Path(beside) if writable else local)
        present, present_here = present | (names_in(beside) if writable else set()), names_in(local)
    files = [(beside if name in present else epath.Path(local)) / name for own in names.values() for name in own]
    return _join(files[0::2], files[1::2], source)


def names_in(folder) -> set[str]:
    """Returns the names of the files in a folder, or none if there is no such folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _count_shards(source: RecordSource, shards: list[epath.Path], counter: Counter, folder: pathlib.Path) -> None:
    total = sum(source.shards[shard] for shard in shards)
    jobs = [(os.fspath(source.folder), source.split, shard.name, counter, os.fspath(folder)) for shard in shards]
    with contextlib.ExitStack() as stack:
        if total > _ALONE and len(jobs) > 1 and (cores := len(os.sched_getaffinity(0))) > 1:
            logging.warning("%s: counting the tokens of %d records", source.folder, total)
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(min(cores, len(jobs)), spawn))
            counts = (
                done.result() for done in concurrent.futures.as_completed([pool.submit(_count, *j) for j in jobs])
            )
        else:
            counts = (_count(*job) for job in jobs)
        bar = tqdm.tqdm(
            total=total, desc="count tokens", unit="record", disable=total <= _ALONE or not sys.stderr.isatty()
        )
        with bar:
            for count in counts:
                bar.update(count)


def _count(folder: str, split: str, shard: str, counter: Counter, target: str) -> int:
    source = read_shards(folder, split, only=shard)
    index = ShardIndex(counter)
    for number in range(len(source)):
        try:
            record = source[number]
        except ValueError as error:
            index.add_unusable(str(error))
        else:
            index.add(record)
    index.save(pathlib.Path(shard), target)
    return len(source)


def _join(sizes: list[epath.Path], tokens: list[epath.Path], source: RecordSource) -> RecordIndex:
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*_SIZES, *_TOKENS)}
    unusable, first = {}, 0
    for records, size_file, token_file in zip(source.shards.values(), sizes, tokens, strict=True):
        arrays = {**_arrays(size_file, _SIZES), **_arrays(token_file, _TOKENS)}
        for name in (*_SIZES, *_TOKENS):
            found[name].append(arrays[name])
        reasons = zip(arrays["unusable"].tolist(), arrays["reasons"].tolist(), strict=True)
        unusable |= {first + number: reason for number, reason in reasons}
        if not _fit(arrays, records):
            raise ValueError(f"{token_file} does not match its shard: delete the folder {token_file.parent}")
        first += records
    joined = {name: np.concatenate(found.pop(name) or [np.zeros(0, np.int32)]) for name in (*_SIZES, *_TOKENS)}
    return RecordIndex(**joined, unusable=unusable)


def _fit(arrays: dict[str, np.ndarray], records: int) -> bool:
    """Returns whether the arrays of a shard's index fit each other and its number of records."""
    images, segments, refs = (int(arrays[f"num_{name}"].sum()) for name in ("images", "segments", "refs"))
    lengths = {"num_images": records, "width": images, "height": images, "num_segments": records, "text": segments,
               "shortest": segments, "num_refs": segments, "refs": refs}  # fmt: skip
    if any(len(arrays[name]) != length for name, length in lengths.items()):
        return False
    held = np.repeat(np.repeat(arrays["num_images"], arrays["num_segments"]), arrays["num_refs"])
    named = bool((arrays["refs"] < held).all()) and all(0 <= number < records for number in arrays["unusable"].tolist())
    positive = ("width", "height", "text", "shortest")
    return named and all(bool((arrays[name] > 0).all()) for name in positive)


def _arrays(path: epath.Path, columns: dict[str, type]) -> dict[str, np.ndarray]:
    """Returns the arrays of an index file after checking their names and types."""
    more = ("unusable", "reasons") if columns is _TOKENS else ()
    try:
        arrays = load_arrays(path, (*columns, *more))
        if any(arrays[name].dtype != dtype or arrays[name].ndim != 1 for name, dtype in columns.items()):
            raise ValueError("a column has the wrong type")
        if more and (arrays["unusable"].dtype != np.int64 or arrays["reasons"].dtype.kind != "U"):
            raise ValueError("a column has the wrong type")
        if more and not arrays["unusable"].shape == arrays["reasons"].shape == (arrays["unusable"].size,):
            raise ValueError("a column has the wrong length")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder {path.parent}") from error
    return arrays
