"""Reads the images that a program or a notebook holds: files, bytes, Pillow images, arrays, and lists of them.

images                    image_of        3 prompts are about
None or []                                text alone
image                                     the image, each
[image, image, image]                     an image each
[image, image]            [0, (0, 1), ()] image 0, both images, text alone
[[image], [image, image], None]           one image, two images, text alone
"""

import base64
import itertools
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

from fastvlm_jax.files import read_small
from fastvlm_jax.images.decode import decode_with_alpha
from fastvlm_jax.images.header import MAX_BYTES, MAX_PIXELS, MAX_SIDE, unreadable
from fastvlm_jax.images.modes import to_array, to_rgb

Image = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image | np.ndarray
_FORMS = "a path, bytes, a file opened as 'rb', a Pillow image or an array"


class MissingImage(FileNotFoundError, ValueError):
    """Says that there is no such image file."""


def share_images(
    images: Any, image_of: Any, held: Sequence[Sequence[Image]]
) -> tuple[list[tuple[str, Image]], list[tuple[int, ...]]]:
    """Returns all images, each with its name in messages, and the numbers of those that each prompt is about.

    Args:
      images: an image, a list of images, or a list with the images of each prompt; see above.
      image_of: the image, or the images, of each prompt; None shares them out as above.
      held: images in the messages of each prompt. If there are any, no others may be given.

    Raises:
      ValueError: the arguments have another form or do not match; the message is one line.
    """
    count = len(held)
    if any(held):
        none = images is None or (isinstance(images, list | tuple) and not images)
        if not none or image_of is not None:
            raise ValueError(
                "images: the messages of the prompts hold images themselves: leave images and image_of out"
            )
        return _joined([[("an image in the messages", image) for image in row] for row in held])
    if images is None or isinstance(images, list | tuple):
        given = images or []
    elif _is_image(images):
        stack = hasattr(images, "ndim") and images.ndim == 4
        given = list(images) if stack else [images]
    else:
        raise ValueError(f"images is of type {type(images).__name__}, not {_FORMS}, or a list of these")
    if any(item is None or isinstance(item, list | tuple) for item in given):
        if image_of is not None or len(given) != count:
            raise ValueError(
                f"images has the images of {len(given)} prompts for {count} prompts"
                + (": leave image_of out" if image_of is not None else "")
            )
        return _joined([_named(f"images[{i}]", row) for i, row in enumerate(given)])
    return _named("images", list(given)), _numbers(image_of, len(given), count)


def to_pixels(image: Image, name: str = "the image", transparency: str = "white") -> np.ndarray:
    """Returns an image as uint8 [H, W, 3].

    Args:
      image: path or data URL, encoded bytes, file opened as "rb", Pillow image, or array [H, W], [H, W, 1], [H, W, 3]
        or [H, W, 4] of uint8, bool, or floats in [0, 1].
      name: name of the image in messages.
      transparency: "white" or "drop", see `to_rgb`.

    Raises:
      MissingImage: there is no such file.
      ValueError: the image has another form, cannot be read, or is too large; the message is one line.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return to_rgb(_from_path(image), transparency)
        if isinstance(image, bytes | bytearray | memoryview):
            return to_rgb(decode_with_alpha(bytes(image)), transparency)
        if isinstance(image, PIL.Image.Image):
            return to_rgb(_from_pillow(image), transparency)
        if hasattr(image, "read"):
            return to_rgb(decode_with_alpha(_bytes_of(image)), transparency)
        if hasattr(image, "__array__"):
            return to_rgb(_from_array(_array_of(image)), transparency)
    except MissingImage as error:
        raise MissingImage(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
    raise ValueError(f"{name} is {'None' if image is None else f'of type {type(image).__name__}'}, not {_FORMS}")


def _is_image(value: Any) -> bool:
    forms = (str, os.PathLike, bytes, bytearray, memoryview, PIL.Image.Image)
    return isinstance(value, forms) or hasattr(value, "read") or hasattr(value, "__array__")


def _named(name: str, images: Any) -> list[tuple[str, Image]]:
    if not isinstance(images, list | tuple):
        return [] if images is None else [(name, images)]
    return [(f"{name}[{i}]", image) for i, image in enumerate(images)]


def _joined(rows: Sequence[Sequence[tuple[str, Image]]]) -> tuple[list[tuple[str, Image]], list[tuple[int, ...]]]:
    """Returns the images of all rows in one list, and the numbers of each row's images in it."""
    ends = np.cumsum([0, *map(len, rows)]).tolist()
    numbers = [tuple(range(start, end)) for start, end in itertools.pairwise(ends)]
    return [image for row in rows for image in row], numbers


def _numbers(image_of: Any, num_images: int, num_prompts: int) -> list[tuple[int, ...]]:
    """Returns the numbers of the images that each prompt is about."""
    every = tuple(range(num_images))
    if image_of is None:
        if num_images <= 1 or num_prompts == 1:
            return [every] * num_prompts
        if num_images == num_prompts:
            return [(i,) for i in every]
        raise ValueError(f"{num_images} images for {num_prompts} texts: set image_of to the image of each text")
    try:
        rows = [tuple(map(operator.index, row if _is_row(row) else [row])) for row in image_of]
    except TypeError:
        rows = []
    if len(rows) != num_prompts or any(i not in every for row in rows for i in row):
        shown = image_of if isinstance(image_of, list | tuple | range) else type(image_of).__name__
        shown = " ".join(str(shown)[:80].split())
        raise ValueError(f"image_of must give each of {num_prompts} texts one of {num_images} images: {shown}")
    return rows


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple | range) or (isinstance(value, np.ndarray) and value.ndim == 1)


def _from_path(path: str | os.PathLike) -> np.ndarray:
    text = os.fspath(path)
    shown = repr(text)[1:-1] if isinstance(text, str) else repr(text)
    shown = shown if len(shown) <= 300 else f"{shown[:300]}..."
    if isinstance(text, str) and text.startswith("data:"):
        return decode_with_alpha(_from_data_url(text))
    if isinstance(text, str) and text.startswith(("http://", "https://")):
        raise ValueError(f"{shown} is an address of the web: download the image, and give its file")
    try:
        file = pathlib.Path(text).expanduser()
        data = read_small(file, MAX_BYTES) if file.is_file() else None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{shown} cannot be opened: {reason}") from error
    if data is None:
        raise MissingImage(f"there is no image {shown or 'with an empty name'}")
    try:
        return decode_with_alpha(data)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error


def _from_data_url(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"a data URL must begin with data:image/TYPE;base64, but begins with {text[:40]!r}")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ValueError(f"the base64 text of a data URL is damaged: {error}") from error


def _bytes_of(file: BinaryIO) -> bytes:
    """Returns all bytes of a file from its start, as one that was just written stands at its end."""
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        data = file.read()
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the file cannot be read: {error}") from error
    if not isinstance(data, bytes):
        raise ValueError(f"the file gives {type(data).__name__}, not bytes: open it as 'rb'")
    return data


def _from_pillow(image: PIL.Image.Image) -> np.ndarray:
    """Returns what `decode` gives for the file of the image: upright, as its EXIF orientation says."""
    _check_size(image.height, image.width)
    try:
        image.load()
        # Pillow itself rotates a TIFF; a copy of it would lose the tags that `to_array` reads.
        return to_array(image if hasattr(image, "tag_v2") else PIL.ImageOps.exif_transpose(image))
    except Exception as error:  # a lazily opened file fails here, as in `decode`
        raise unreadable(error) from error


def _array_of(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # a tensor on a device, or one that needs a gradient
        raise ValueError(f"the {type(value).__name__} cannot become an array: {error}") from error


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        mend = ": move the channels to the last axis" if first and array.size else ""
        raise ValueError(
            f"an array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {array.dtype} {list(array.shape)}{mend}"
        )
    _check_size(*array.shape[:2])
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"an array of {array.dtype} must be in [0, 1], not from {low:g} to {high:g}")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"an array must be uint8, bool, or floats in [0, 1], not {array.dtype} {list(array.shape)}")
    if array.ndim == 3 and array.shape[2] == 4:
        return np.ascontiguousarray(array)
    array = array if array.ndim == 3 else array[..., None]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _check_size(height: int, width: int) -> None:
    if not height or not width or height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise ValueError(
            f"{width} x {height} pixels: an image must have at least 1 x 1, at most {MAX_PIXELS:,}, and at most "
            f"{MAX_SIDE:,} along a side"
        )
