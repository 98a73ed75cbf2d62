"""The order of one epoch, and how it is kept on disk."""

import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging

from fastvlm_jax.files import save_arrays

_FILES = 16  # epochs kept on disk


class Epoch(NamedTuple):
    """The groups and batches of one epoch.

    Attributes:
      records: of each bucket, int32, record numbers over all data sets, in the order of the groups.
      first: of each bucket, int64 [groups + 1], where each group begins in `records`.
      bucket: int32 [batches]. number: int32 [batches], of the batch within its bucket.
    """

    records: list[np.ndarray]
    first: list[np.ndarray]
    bucket: np.ndarray
    number: np.ndarray


def read_epoch(path: pathlib.Path, buckets: int) -> Epoch | None:
    """Returns an epoch kept on disk; None where there is none, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            records, first = ([stored[f"{name}{b}"] for b in range(buckets)] for name in ("records", "first"))
            return Epoch(records, first, stored["bucket"], stored["number"])
    except Exception:  # no such file, or whatever zipfile, zlib and numpy find in it: it is made again
        return None


def write_epoch(path: pathlib.Path, epoch: Epoch) -> None:
    """Keeps an epoch on disk, and only the latest ones; a full or read-only disk costs the next start its time."""
    arrays = {f"{name}{b}": a for name in ("records", "first") for b, a in enumerate(getattr(epoch, name))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {"bucket": epoch.bucket, "number": epoch.number, **arrays})
        kept = sorted(path.parent.glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in kept[_FILES:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("the order of this epoch is not kept in %s: %s", path.parent, error)
