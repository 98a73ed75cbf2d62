"""Describes the order of one epoch, and caches it on disk."""

import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging

from fastvlm_jax.files import save_arrays

_FILES = 16  # epochs kept on disk


class Epoch(NamedTuple):
    """Holds the groups and batches of one epoch.

    Attributes:
      records: for each bucket, int32 record numbers over all data sets, in the order of the groups.
      first: for each bucket, int64 [groups + 1], offset in `records` at which each group begins.
      bucket: int32 [batches], bucket of each batch.
      number: int32 [batches], number of each batch within its bucket.
    """

    records: list[np.ndarray]
    first: list[np.ndarray]
    bucket: np.ndarray
    number: np.ndarray


def read_epoch(path: pathlib.Path, buckets: int) -> Epoch | None:
    """Returns the epoch cached in `path`, with its number of `buckets`; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            records, first = ([stored[f"{name}{b}"] for b in range(buckets)] for name in ("records", "first"))
            return Epoch(records, first, stored["bucket"], stored["number"])
    except Exception:  # no such file, or any error of zipfile, zlib and numpy: it is computed again
        return None


def write_epoch(path: pathlib.Path, epoch: Epoch) -> None:
    """Caches an epoch on disk and deletes all but the latest _FILES.

    On a full or read-only disk it only warns: the next start then computes the epoch again.
    """
    arrays = {f"{name}{b}": a for name in ("records", "first") for b, a in enumerate(getattr(epoch, name))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {"bucket": epoch.bucket, "number": epoch.number, **arrays})
        kept = sorted(path.parent.glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in kept[_FILES:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("the order of this epoch cannot be cached in %s: %s", path.parent, error)
