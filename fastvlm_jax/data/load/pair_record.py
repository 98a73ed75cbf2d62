"""Reads what a record holds for the distillation of stage 0: augmentations and teachers' features."""

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastvlm_jax.data.readers.datacompdr import augmentations
from fastvlm_jax.data.record import Record

_DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def augmentations_of(record: Record) -> list[Any]:
    """Returns the entries of a record's `param_aug`, for `images.augment.read_params`; see datacompdr.augmentations.

    Raises:
      ValueError: the record has none.
    """
    try:
        return augmentations(record.extra.get("augmentation"))
    except ValueError as error:
        raise ValueError(f"{error}, which data.augment='replay' asks for") from error


def features_of(record: Record, name: str, rows: Sequence[int], count: int, widths: Sequence[int]) -> np.ndarray:
    """Returns rows of the teachers' features of a record, float32 [rows, sum of widths], as they are stored.

    Args:
      name: "image", a row for each augmentation, or "text", a row for each caption, the synthetic ones last.
      rows: numbers of the rows.
      count: number of rows that there have to be.
      widths: widths of the features of each teacher.

    Raises:
      ValueError: the record has no such features, or others; the message says why.
    """
    teacher = record.extra.get("teacher")
    stored = teacher.get(name) if isinstance(teacher, dict) else None
    if not isinstance(stored, dict):
        raise ValueError(f"no {name} features of teachers, which loss.teachers asks for")
    try:
        dtype, data = _DTYPES.get(stored["dtype"]), stored["data"]
        shape = tuple(int(side) for side in stored["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the {name} features of its teachers are not an array") from error
    if dtype is None:
        raise ValueError(f"{name} features of type {stored['dtype']}, not float16, float32 or bfloat16")
    if len(shape) != 2 or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} features of the shape {list(shape)} in {len(data)} bytes")
    if shape[1] != sum(widths):
        raise ValueError(
            f"teachers of {' + '.join(map(str, widths))} = {sum(widths)} features, the record has {shape[1]}: set "
            "loss.teachers to the widths of those that are stored"
        )
    if shape[0] != count:
        what = "augmentations" if name == "image" else "captions, synthetic ones included"
        raise ValueError(f"{shape[0]} rows of {name} features for {count} {what}")
    width = shape[1]
    features = np.stack([np.frombuffer(data, dtype, width, row * width * dtype.itemsize) for row in rows])
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"{name} features that are not finite")
    return features
