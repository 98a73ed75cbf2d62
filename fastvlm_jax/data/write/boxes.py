"""Keeps the boxes of a record's augmentations in step with its picture, whose pixels they count."""

import dataclasses

from fastvlm_jax.data.readers.boxes import scaled
from fastvlm_jax.data.record import Record
from fastvlm_jax.images.header import read_header


def fitted(record: Record, size: tuple[int, int], new_size: tuple[int, int]) -> Record:
    """Returns a record whose boxes are those of its shrunk picture, the record itself if it has no `param_aug`.

    A box keeps the part of the picture that it shows, to whole pixels. Operations stay as they are: their translations
    count pixels of the augmented view.

    Args:
      record: record of one picture.
      size: (width, height) of the picture whose pixels the boxes count.
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
    kept = scaled(stored, size, new_size)
    return record if kept is stored else dataclasses.replace(record, extra=record.extra | {"augmentation": kept})
