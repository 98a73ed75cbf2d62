"""Reads what a record holds for a pair of stage 0: captions, synthetic captions, augmentations, teachers' features."""

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fastvlm_jax.data.readers.datacompdr import augmentations
from fastvlm_jax.data.record import Record, check
from fastvlm_jax.text.conversation import split_system

_DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def captions_of(record: Record) -> list[str]:
    """Returns the captions of a record: those of `extra["captions"]`, or its one answer.

    Raises:
      ValueError: the record is not one image and its caption; the message says why.
    """
    if wrong := check(record):
        raise ValueError(wrong)
    if len(record.images) != 1:
        raise ValueError(f"{len(record.images)} images, a pair has one")
    _, talk = split_system(record.turns)
    if len(talk) != 2:
        raise ValueError(f"{len(talk) // 2} questions are no caption")
    (_, answer) = talk[1]
    if not all(isinstance(part, str) for part in answer):
        raise ValueError("an image in the answer, a caption is text")
    return _texts(record, "captions") or ["".join(answer)]


def synthetic_captions_of(record: Record) -> list[str]:
    """Returns the synthetic captions of a record, perhaps none; raises ValueError if they are not texts."""
    return _texts(record, "synthetic_captions")


def _texts(record: Record, key: str) -> list[str]:
    texts = record.extra.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{key} is not a list of texts")
    return texts


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
