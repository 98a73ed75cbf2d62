"""Finds the picture whose pixels the boxes of augmentations count, and scales them to another size of it.

--boxes ""          the picture as it is stored
--boxes original    the one that img2dataset downloaded: original_width and original_height in its KEY.json
--boxes 512         the picture shrunk to a longer side of 512 if it is larger, as DataComp's own download stores it
"""

from typing import Any

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.datacompdr import augmentations
from fastvlm_jax.images.augment import check_crop, read_params, scale_crop
from fastvlm_jax.images.decode import size_of

ORIGINAL = "original"


def check(choice: str) -> None:
    """Raises ValueError if `choice` is none of those above."""
    if choice not in ("", ORIGINAL) and not (choice.isascii() and choice.isdigit() and 0 < int(choice[:9]) < 10**6):
        raise ValueError(f"--boxes {shown(choice)}: give {ORIGINAL!r}, or the longer side of the pictures, pixels")


def of_picture(stored: Any, choice: str, about: dict[str, Any], image: bytes) -> Any:
    """Returns a parsed `paug.json` whose boxes count the pixels of `image`.

    Args:
      stored: the parsed file, whose boxes count those of the picture that `choice` says.
      choice: value of --boxes.
      about: the parsed `KEY.json` of the picture.
      image: encoded picture.

    Raises:
      ValueError: that picture is not known, or is no larger or smaller one of this; or see `scaled`.
    """
    new_size = size_of(image)
    if choice == ORIGINAL:
        size = about.get("original_width"), about.get("original_height")
        if not all(type(side) is int and 0 < side < 10**6 for side in size):
            raise ValueError("its .json has no original_width and original_height, which --boxes original asks for")
        (width, height), (new_width, new_height) = size, new_size
        if abs(width * new_height - height * new_width) > max(size):  # more than a pixel's rounding
            raise ValueError(
                f"its picture of {new_width} x {new_height} is the original of {width} x {height} cropped, padded or "
                "stretched: its boxes cannot be scaled"
            )
    else:
        factor = min(int(choice) / max(new_size), 1)
        size = tuple(max(1, round(side * factor)) for side in new_size)
    return scaled(stored, size, new_size)


def scaled(stored: Any, size: tuple[int, int], new_size: tuple[int, int]) -> Any:
    """Returns a parsed `paug.json` with its boxes scaled, to whole pixels; `stored` itself if the sizes are equal.

    Args:
      stored: the parsed file.
      size: (width, height) of the picture whose pixels the boxes count.
      new_size: (width, height) of the picture whose pixels they are to count.

    Raises:
      ValueError: an augmentation cannot be read, or its box is not inside the picture; the message is a short line.
    """
    entries: list[Any] = augmentations(stored)
    for number, entry in enumerate(entries):
        crop, _ = read_params(entry)
        if crop is None:
            continue
        try:
            check_crop(crop, size[::-1])
        except ValueError as error:
            raise ValueError(
                f"the box of augmentation {number} was drawn for another picture: {error} --boxes tells its size"
            ) from error
        entries[number] = [list(scale_crop(crop, size[::-1], new_size[::-1])), entry[1]]
    return stored if size == new_size else stored | {"param_aug": entries}
