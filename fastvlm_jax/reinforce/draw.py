"""Makes of a record what its teachers see: its captions, and augmented views of its picture.

Augmentation a of record n is a function of (seed, n, a) and of the picture's size alone.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvlm_jax.data.captions import captions_of, synthetic_captions_of
from fastvlm_jax.data.readers import pictures
from fastvlm_jax.data.readers.conversations import MAX_NAME, about_image, shown, text_of
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write.reinforced import Sample
from fastvlm_jax.images import augment
from fastvlm_jax.images.decode import decode, upright
from fastvlm_jax.images.operations import OPS
from fastvlm_jax.images.resize import fit_into
from fastvlm_jax.reinforce.plan import Settings

DRAWN_FOR = (224, 224)  # (height, width) of the view for which published sets tell translations, pixels
MAX_LISTS = 14  # lists of synthetic captions: each gets an array of its own, and a reader takes 16
_STORED_APART = ("captions", "synthetic_captions", "synthetic_keys", "augmentation", "teacher")


def make_sample(record: Record, number: int, settings: Settings) -> tuple[Sample, np.ndarray]:
    """Returns a record as it is stored, and its decoded picture, uint8 [H, W, 3].

    Args:
      record: a pair of a picture and its caption.
      number: its number in the source.
      settings: number, crops, operations and seed of the augmentations.

    Raises:
      ValueError: the record is no pair, or its picture cannot be decoded; the message is a short line.
    """
    captions = [text_of(text, "a caption") for text in captions_of(record)]
    about_image(captions[0], record.key, ())  # refuses what the reader of tars would refuse
    if len(captions) == 1:
        captions = [captions[0].strip()]  # as a .txt is read
    synthetic = _synthetic_lists(record)
    picture = upright(record.images[0])
    image = decode(picture)
    entries = []
    for augmentation in range(settings.augmentations):
        crop, ops = augment.sample(
            settings.seed, augmentation, number, image.shape[:2], DRAWN_FOR, *settings.operations, settings.crop_area
        )
        entries.append([list(crop), [[OPS.index(name), value] for name, value in ops]])
    extra = {key: value for key, value in record.extra.items() if key not in _STORED_APART and _is_plain(value)}
    about = {"key": record.key, "turns": record.turns, "extra": extra}
    return Sample(number, picture, captions, synthetic, entries, about), image


def views_of(image: np.ndarray, entries: Sequence[Any], side: int, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """Returns the augmented views of a picture at the size of each teacher, uint8 [augmentations, size, size, 3].

    A view is made at `side`, as it will be replayed, and resized for a teacher that sees another size.

    Args:
      image: uint8 [H, W, 3].
      entries: augmentations, as `param_aug` lists them.
      side: side of the views, pixels.
      sizes: sides of the squares that the teachers see, pixels.
    """
    views = np.empty((len(entries), side, side, 3), np.uint8)
    for entry, view in zip(entries, views, strict=True):
        crop, ops = augment.read_params(entry)
        augment.augment_into(image, view, crop, augment.at_side(ops, side), exact=True)
    return {size: views if size == side else _resized(views, size) for size in set(sizes)}


def _resized(views: np.ndarray, side: int) -> np.ndarray:
    resized = np.empty((len(views), side, side, 3), np.uint8)
    for view, out in zip(views, resized, strict=True):
        fit_into(view, out, "stretch", exact=True)
    return resized


def _synthetic_lists(record: Record) -> dict[str, list[str]]:
    """Returns the synthetic captions of a record by the key under which they were published."""
    texts = [text_of(text, "a synthetic caption") for text in synthetic_captions_of(record)]
    counts, left = record.extra.get("synthetic_keys", [["syn_text", len(texts)]]), iter(texts)
    try:
        lists = {text_of(key, "a key"): list(itertools.islice(left, count)) for key, count in counts if count}
        fits = sum(count for _, count in counts) == sum(map(len, lists.values())) == len(texts)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"synthetic_keys {shown(str(counts))} do not count its {len(texts)} synthetic captions")
    if len(lists) > MAX_LISTS or (len(lists) > 1 and lists.keys() & {"image", "text"}):
        raise ValueError(f"{len(lists)} lists of synthetic captions: up to {MAX_LISTS}, none called image or text")
    if wrong := [key for key in lists if not key.isprintable() or len(key) > MAX_NAME]:
        raise ValueError(f"a list of synthetic captions is called {shown(wrong[0])}, which names no array")
    return lists


def _is_plain(value: Any) -> bool:
    """Returns whether JSON can hold a value, and a reader of tars will not take it for a picture of its own."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return not any(map(pictures.is_encoded, pictures.found_in(value)))
