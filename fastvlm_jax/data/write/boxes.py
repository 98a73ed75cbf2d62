"""Keeps the boxes of a record's augmentations in step with its picture, whose pixels they count."""

import dataclasses
from typing import Any

from fastvlm_jax.data.readers.datacompdr import augmentations
from fastvlm_jax.data.record import Record
from fastvlm_jax.images.augment import check_crop, read_params, scale_crop
from fastvlm_jax.images.header import read_header


def fitted(record: Record, size: tuple[int, int], new_size: tuple[int, int]) -> Record:
    """Returns a record whose boxes are those of its shrunk picture, the record itself if it has no `param_aug`.

    A box keeps the part of the picture that it shows, to whole pixels. Operations stay as they are: their translations
    count pixels of the augmented view.

    Args:
      record: record of one picture.
      size: (width, height) of the picture for which the boxes were drawn.
      new_size: (width, height) that it is shrunk to; `size` if it is not.

    Raises:
      ValueError: an augmentation cannot be read, its box is not inside the picture, or EXIF turns the picture, which
        nobody heeds who draws boxes for a published set; the message is a short line.
    """
    stored = record.extra.get("augmentation")
    if not isinstance(stored, dict) or stored.get("param_aug") is None:
        return record
    if (turned := read_header(record.images[0]).orientation) != 1:
        raise ValueError(
            f"its EXIF orientation {turned} turns it, the boxes of its augmentations are those of the picture before: "
            "store it without EXIF"
        )
    entries: list[Any] = augmentations(stored)
    for number, entry in enumerate(entries):
        crop, _ = read_params(entry)
        if crop is None:
            continue
        try:
            check_crop(crop, size[::-1])
        except ValueError as error:
            raise ValueError(f"the box of augmentation {number} was drawn for another picture: {error}") from error
        entries[number] = [list(scale_crop(crop, size[::-1], new_size[::-1])), entry[1]]
    if size == new_size:
        return record
    return dataclasses.replace(record, extra=record.extra | {"augmentation": stored | {"param_aug": entries}})
