"""Looks at checkpoints from outside a run: what they are, and whether they are whole."""

import concurrent.futures
import datetime
import pathlib
from typing import NamedTuple

from fastvlm_jax.checkpoint.arrays import THREADS, StoredArray, make_cache, names_of
from fastvlm_jax.checkpoint.folder import FOLDER, METADATA, read_notes

PARTS = ("model", "training")


class Proof(NamedTuple):
    """Says what of a checkpoint was proven.

    Attributes:
      arrays: number of arrays, all of which were read.
      sealed: whether they were compared with digests; a version that stored none may have written it.
    """

    arrays: int
    sealed: bool


class Summary(NamedTuple):
    """Describes a checkpoint.

    Attributes:
      written: local time of its last change.
      position: number of the next batch.
      passed_over: number of batches that are not drawn.
      sealed: whether it has digests.
      size: bytes on the disk.
    """

    written: datetime.datetime
    position: int
    passed_over: int
    sealed: bool
    size: int


def verify(folder: pathlib.Path) -> Proof:
    """Reads a checkpoint whole, on this host and without its model, and compares every array with its digest.

    Raises:
      Damaged: a file or an array is missing, not readable, or not what was saved; the message names the first.
    """
    digests, cache = read_notes(folder)["digests"], make_cache()
    known = digests or {part: dict.fromkeys(names_of(folder, part)) for part in PARTS}

    def prove(array: tuple[str, str, str | None]) -> None:
        part, name, expected = array
        StoredArray(folder, part, name, cache, expected).prove()

    arrays = [(part, name, expected) for part, names in known.items() for name, expected in names.items()]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(prove, arrays))
    return Proof(len(arrays), digests is not None)


def summarize(folder: pathlib.Path) -> Summary:
    """Describes a checkpoint without reading its arrays.

    Raises:
      Damaged: its notes are missing or not what was written.
    """
    notes = read_notes(folder)
    written = datetime.datetime.fromtimestamp((folder / METADATA).stat().st_mtime)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Summary(written, notes["position"], len(notes["passed_over"]), notes["digests"] is not None, size)


def kept_aside(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of damaged checkpoints that runs have set aside."""
    return sorted((workdir / FOLDER).glob("*.damaged*"))
