"""Reads what a record holds for the distillation of stage 0: augmentations and teachers' features."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastvlm_jax.data.features import describe, read_rows
from fastvlm_jax.data.readers.datacompdr import augmentations
from fastvlm_jax.data.record import Record


def augmentations_of(record: Record) -> list[Any]:
    """Returns the entries of a record's `param_aug`, for `images.augment.read_params`; see datacompdr.augmentations.

    Raises:
      ValueError: the record has none.
    """
    try:
        return augmentations(record.extra.get("augmentation"))
    except ValueError as error:
        raise ValueError(f"{error}, which data.augment='replay' asks for") from error


def features_of(
    record: Record, rows: Mapping[str, Sequence[int]], counts: Mapping[str, int], widths: Sequence[int], path: str = ""
) -> dict[str, np.ndarray]:
    """Returns rows of the teachers' features of a record, float32 [number of rows, sum of widths], as they are stored.

    Args:
      rows: numbers of the rows that are wanted: "image" has one for each augmentation, "text" one for each caption, the
        synthetic ones last.
      counts: number of rows that there have to be, by the same names.
      widths: widths of the features of each teacher.
      path: file beside the shard of the record, which has the features that the record tells of without holding them.

    Raises:
      ValueError: the record has no such features, or others, or they cannot be read; the message says why.
    """
    teacher, wanted = record.extra.get("teacher"), []
    for name, own in rows.items():
        stored = teacher.get(name) if isinstance(teacher, dict) else None
        if not isinstance(stored, dict):
            raise ValueError(f"no {name} features of teachers, which loss.teachers asks for")
        features = describe(stored, name)
        if features.width != sum(widths):
            raise ValueError(
                f"teachers of {' + '.join(map(str, widths))} = {sum(widths)} features, the record has "
                f"{features.width}: set loss.teachers to the widths of those that are stored"
            )
        if features.rows != counts[name]:
            what = "augmentations" if name == "image" else "captions, synthetic ones included"
            raise ValueError(f"{features.rows} rows of {name} features for {counts[name]} {what}")
        wanted.append((features, own))
    found = {name: array.astype(np.float32) for name, array in zip(rows, read_rows(wanted, path), strict=True)}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} features that are not finite")
    return found
