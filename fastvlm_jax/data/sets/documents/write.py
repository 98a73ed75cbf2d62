"""Writes the pages as shards, with several processes: the full set, and beside it the part for tiny models.

OUTPUT/                   "pages": every kind of page, its transcription, and questions about it
OUTPUT/numbers/           four numbers a page, as captions: a page is answered by its transcription, without a question
OUTPUT/large_numbers/     one, two or four numbers in large digits, for the first steps of a model
OUTPUT/documents.json     what the pages were drawn from: the seed, their number, the versions of the packages
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import itertools
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from fastvlm_jax.data.record import Record, pack, unpack
from fastvlm_jax.data.sets.described import describe, is_there
from fastvlm_jax.data.sets.documents import numbers, pages
from fastvlm_jax.data.sets.documents.data_sets import read_data_sets
from fastvlm_jax.data.sets.documents.page import Page
from fastvlm_jax.data.sets.documents.texts import read_texts
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.data.write.tokenizer import FILE, write_tokenizer
from fastvlm_jax.data.write.workers import share_out
from fastvlm_jax.files import write_whole

DESCRIBED, _WRITING = "documents.json", ".documents.writing"
TRANSCRIBE = "Transcribe the page."
SPLITS = {"train": 1, "validation": 16, "test": 8}  # a page of the split for so many of training
_PACKAGES = ("matplotlib", "numpy", "pillow", "scikit-learn", "vega-datasets")
_CHUNK = 64  # pages that a process draws at once
_FEW = 4 * _CHUNK  # pages up to which starting processes takes longer than it saves


class Part(NamedTuple):
    """Describes a part of the set.

    Attributes:
      folder: its folder in the output, "" for the output itself.
      draw: draws a page from the seed, the split and the number of the page.
      prompt: what is asked for a transcription; "" asks nothing.
      vocab_size: largest number of ids of its tokenizer.
    """

    folder: str
    draw: Callable[[int, str, int], Page]
    prompt: str
    vocab_size: int


_CHARACTERS = 289  # ids of a tokenizer that has no room for more than characters: each digit is a token
PARTS = {
    "pages": Part("", pages.draw, TRANSCRIBE, 512),
    "numbers": Part("numbers", numbers.draw, "", _CHARACTERS),
    "large_numbers": Part(
        "large_numbers", functools.partial(numbers.draw, sizes=numbers.LARGE, counts=numbers.FIRST), "", _CHARACTERS
    ),
}


def write_documents(
    output: str | os.PathLike,
    pages: int = 8000,
    seed: int = 0,
    *,
    parts: Sequence[str] = tuple(PARTS),
    workers: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, int]:
    """Writes parts, each with the splits `train`, `validation` and `test` and a `tokenizer.model` of its own.

    A page depends on the seed, its split and its number alone: a smaller set is the beginning of a larger one, and any
    number of processes writes the same bytes. What a stopped run has finished is kept.

    Args:
      output: local folder.
      pages: number of training pages of each part; validation has a 16th as many, test an 8th.
      seed: seed of the pages.
      parts: names in PARTS; the others can be written later.
      workers: number of processes; 0 for one a core.
      progress: function that is called with a number of pages when they are drawn, and how many are to be drawn.

    Returns:
      Number of pages in each split of each part.

    Raises:
      ValueError: a package is missing, an argument is out of range, `output` is a file or holds another set, or another
        process is writing to it.
      OSError: `output` cannot be written to.
    """
    if pages < 1 or seed < 0 or workers < 0:
        raise ValueError(
            f"pages {pages}, seed {seed}, workers {workers}: pages must be 1 or more, the others 0 or more"
        )
    if not parts or not PARTS.keys() >= set(parts):
        raise ValueError(f"parts {','.join(parts)!r}: choose from {', '.join(PARTS)}")
    output = pathlib.Path(output).expanduser()
    counts = {split: max(1, pages // share) for split, share in SPLITS.items()}
    chosen = [PARTS[name] for name in dict.fromkeys(parts)]
    to_do = [(part, split) for part in chosen for split in counts if not is_there(output / part.folder, split)]
    if to_do:  # what is missing is told before anything is written
        read_data_sets("test")
        if "pages" in parts:
            read_texts("test")
    versions = {"versions": _versions()} if to_do else {}  # a finished set is one, whatever is installed
    describe(output / DESCRIBED, {"seed": seed, "pages": pages, **versions})
    with _alone(output):
        jobs = {(part, split): list(_jobs(output, part, seed, split, counts[split])) for part, split in to_do}
        few = sum(counts[split] for _, split in to_do) <= _FEW
        _run(list(itertools.chain(*jobs.values())), 1 if few else workers or len(os.sched_getaffinity(0)), progress)
        for (part, split), own in jobs.items():
            write_shards(output / part.folder, split, (record for job in own for record in _read(job)))
        for part in chosen:
            if not (output / part.folder / FILE).is_file():
                write_tokenizer(output / part.folder, part.vocab_size)
        shutil.rmtree(output / _WRITING, ignore_errors=True)
    return counts


def record(part: Part, split: str, number: int, page: Page) -> Record:
    """Returns the record of a page: its transcription, then its questions. "asked" in `extra` names what each asks."""
    prompt = (0, part.prompt) if part.prompt else (0,)
    turns = [("user", prompt), ("assistant", (page.text,))]
    for question in page.questions:
        turns += [("user", (question.text,)), ("assistant", (question.answer,))]
    extra = {
        "kind": page.kind,
        "size": list(page.picture.size),
        "font_size": page.font_size,
        "source": page.source,
        "asked": ["transcription", *(question.kind for question in page.questions)],
    }
    return Record(f"{split}/{number}", (page.png(),), tuple(turns), extra)


@contextlib.contextmanager
def _alone(output: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder within the block; the lock ends with this one, however it ends.

    Raises:
      ValueError: another process is writing there.
    """
    (output / _WRITING).mkdir(parents=True, exist_ok=True)
    with (output / _WRITING / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {output}: wait for its end, or stop it") from None
        yield


class _Job(NamedTuple):
    """Describes the pages that a process draws at once, and the file that takes their records until all are drawn."""

    file: pathlib.Path
    part: Part
    seed: int
    split: str
    numbers: range


def _jobs(output: pathlib.Path, part: Part, seed: int, split: str, count: int) -> Iterator[_Job]:
    for start in range(0, count, _CHUNK):
        file = output / _WRITING / f"{part.folder or 'pages'}-{split}-{start}"
        yield _Job(file, part, seed, split, range(start, min(start + _CHUNK, count)))


def _run(jobs: Sequence[_Job], workers: int, progress: Callable[[int, int], Any] | None) -> None:
    """Draws the pages of the jobs that no stopped run has finished."""
    left = [job for job in jobs if not job.file.is_file()]
    count = sum(len(job.numbers) for job in left)

    def on_report(job: _Job) -> None:
        if progress:
            progress(len(job.numbers), count)

    share_out(_draw, left, on_report, workers)


def _draw(job: _Job, report: Callable) -> None:
    records = [
        record(job.part, job.split, number, job.part.draw(job.seed, job.split, number)) for number in job.numbers
    ]
    write_whole(job.file, msgpack.packb([pack(one) for one in records]))


def _read(job: _Job) -> Iterator[Record]:
    yield from map(unpack, msgpack.unpackb(job.file.read_bytes()))


def _versions() -> dict[str, str]:
    """Returns what the pages depend on besides the seed: the packages, and Python, whose documentation they show."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}
