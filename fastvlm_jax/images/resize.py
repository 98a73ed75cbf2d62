"""Resizes uint8 images into given arrays: padded, cropped, stretched or tiled; Pillow's pixels or OpenCV's speed."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import PIL.Image

cv2.setNumThreads(1)  # the data pipeline's threads already use the cores

Background = tuple[int, int, int]
# Most that an image is shrunk by a filter of three pixels and cubic interpolation. On photos they come within 43 to
# 52 dB of Pillow's bicubic, area means within 39 to 44 in three times the time; beyond this factor both are as near.
_MAX_SOFTENED = 2.5
_ROWS = 256  # rows resized at a time, so that a 500 x 30,000 image is never padded to 30,000 x 30,000 in memory


def fit_into(
    image: np.ndarray, out: np.ndarray, mode: str = "pad", background: Background = (0, 0, 0), exact: bool = False
) -> None:
    """Resizes an image into `out` and writes every pixel of it.

        pad      the whole image, its aspect kept, centred on `background` (LLaVA's `expand2square` for a square)
        crop     the centre of the image, its aspect kept, covers `out` (CLIP's shortest edge and centre crop)
        stretch  the whole image fills `out`, its aspect not kept (LLaVA's overview for AnyRes)

    Args:
      image: uint8 [h, w, 3].
      out: uint8 [H, W, 3]; may be a view if the pixels of each row are contiguous.
      mode: pad, crop or stretch.
      background: RGB colour around a padded image.
      exact: whether to use Pillow's bicubic, which gives the pixels of transformers' CLIPImageProcessor. Otherwise
        OpenCV is used: cubic, where the image shrinks behind a small filter or, if it shrinks much, area means; within
        half a pixel of the exact position.

    Raises:
      ValueError: the mode is unknown.
    """
    if mode == "stretch":
        (_resize_exactly if exact else resize)(image, out)
    elif mode == "pad":
        (_pad_exactly if exact else _pad)(image, out, background)
    elif mode == "crop":
        (_crop_exactly if exact else _crop)(image, out)
    else:
        raise ValueError(f"unknown mode {mode!r} to fit images: choose pad, crop or stretch")


def tiles_into(image: np.ndarray, out: np.ndarray, grid: tuple[int, int], exact: bool = False) -> None:
    """Resizes an image to rows * H x columns * W, its aspect kept, on black, and writes its tiles, row by row.

    Exact tiles equal the ones of LLaVA and FastVLM (`resize_and_pad_image`, `divide_to_patches`), which pad with black
    whatever the encoder's mean is.

    Args:
      image: uint8 [h, w, 3].
      out: uint8 [rows * columns, H, W, 3], overwritten.
      grid: (rows, columns) of tiles.
      exact: see `fit_into`.
    """
    rows, columns = grid
    _, height, width, _ = out.shape
    canvas = np.empty((rows * height, columns * width, 3), np.uint8)
    inside = _letterbox(canvas, _tiled(image.shape[:2], canvas.shape[:2]), (0, 0, 0))
    (_resize_exactly if exact else resize)(image, inside)
    out.reshape(rows, columns, height, width, 3)[:] = canvas.reshape(rows, height, columns, width, 3).swapaxes(1, 2)


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Resizes uint8 [h, w, 3] into uint8 [H, W, 3] with OpenCV."""
    (height, width), (new_height, new_width) = image.shape[:2], out.shape[:2]
    if (height, width) == (new_height, new_width):
        out[:] = image
        return
    factors = width / new_width, height / new_height
    if max(factors) > _MAX_SOFTENED:
        if min(factors) < 1:  # one side shrinks, the other grows: shrink first
            middle = np.empty((min(height, new_height), min(width, new_width), 3), np.uint8)
            resize(image, middle)
            resize(middle, out)
        else:
            cv2.resize(image, (new_width, new_height), dst=out, interpolation=cv2.INTER_AREA)
        return
    if max(factors) > 1:
        image = cv2.sepFilter2D(image, -1, *map(_softening, factors), borderType=cv2.BORDER_REPLICATE)
    cv2.resize(image, (new_width, new_height), dst=out, interpolation=cv2.INTER_CUBIC)


def _softening(factor: float) -> np.ndarray:
    """Returns the filter, float32 [3], with which cubic interpolation shrinks by a factor without aliasing.

    Its weights come near to Pillow's bicubic on photos and on noise; from 2.4 on they are the mean of three pixels.
    """
    side = 0.38 * math.log(min(max(factor, 1), 2.4))
    return np.array([side, 1 - 2 * side, side], np.float32)


def pad_scaled(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) to which an image of `size` is resized to fit inside a box."""
    (top, bottom), (left, right) = _placed(size, box)
    return bottom - top, right - left


def crop_scaled(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) to which an image of `size` is resized to cover a box."""
    scale = max(box[0] / size[0], box[1] / size[1])
    return max(box[0], int(size[0] * scale)), max(box[1], int(size[1] * scale))


def _centred(length: float, whole: int) -> int:
    """Returns the integer nearest to `length` that leaves an even rest of `whole`: centring shifts by whole pixels."""
    return min(whole, max(whole - 2 * round((whole - length) / 2), 1 + (whole + 1) % 2))


def _canvas(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Returns the (rows, columns) of the smallest canvas that holds the image and has the aspect of `box`."""
    return max(size[0], round(size[1] * box[0] / box[1])), max(size[1], round(size[0] * box[1] / box[0]))


def _placed(size: tuple[int, int], box: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns where the image lies in a box to which its canvas is resized: (top, bottom), (left, right), pixels."""
    edges = []
    for length, canvas, new in zip(size, _canvas(size, box), box, strict=True):
        before = (canvas - length) // 2
        first = min(round(before * new / canvas), new - 1)
        edges.append((first, max(first + 1, round((before + length) * new / canvas))))
    return edges


def _letterbox(out: np.ndarray, edges: Sequence[tuple[int, int]], background: Background) -> np.ndarray:
    """Paints the area outside (top, bottom), (left, right) and returns a view of the inside."""
    (top, bottom), (left, right) = edges
    for border in (out[:top], out[bottom:], out[top:bottom, :left], out[top:bottom, right:]):
        if border.size:  # OpenCV paints 40 times faster than numpy
            cv2.rectangle(border, (0, 0), border.shape[1::-1], background, cv2.FILLED)
    return out[top:bottom, left:right]


def room_for(out: np.ndarray, size: tuple[int, int], background: Background) -> np.ndarray | None:
    """Returns the part of `out` that an image of `size` fills without resizing, after painting the borders; else None.

    The part is contiguous in memory, so the image must be as wide as `out`.
    """
    (top, bottom), (left, right) = edges = _placed(size, out.shape[:2])
    if (bottom - top, right - left) != size or right - left != out.shape[1] or not out.flags.c_contiguous:
        return None
    return _letterbox(out, edges, background)


def _pad(image: np.ndarray, out: np.ndarray, background: Background) -> None:
    resize(image, _letterbox(out, _placed(image.shape[:2], out.shape[:2]), background))


def _crop(image: np.ndarray, out: np.ndarray) -> None:
    (height, width), (new_height, new_width) = image.shape[:2], out.shape[:2]
    scale = max(new_height / height, new_width / width)
    rows, columns = _centred(new_height / scale, height), _centred(new_width / scale, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    resize(image[top : top + rows, left : left + columns], out)


def _pad_exactly(image: np.ndarray, out: np.ndarray, background: Background) -> None:
    (height, width), new_width = image.shape[:2], out.shape[1]
    rows, columns = _canvas(image.shape[:2], out.shape[:2])
    top, left = (rows - height) // 2, (columns - width) // 2
    # Pillow resizes along rows, rounds, then resizes along columns, so two passes give the same pixels; rows of
    # background alone do not change in the first pass.
    narrow = np.full((rows, new_width, 3), background, np.uint8)
    padded = np.full((min(height, _ROWS), columns, 3), background, np.uint8)
    for row in range(0, height, _ROWS):
        some = image[row : row + _ROWS]
        padded[: len(some), left : left + width] = some
        _resize_exactly(padded[: len(some)], narrow[top + row : top + row + len(some)])
    _resize_exactly(narrow, out)


def _crop_exactly(image: np.ndarray, out: np.ndarray) -> None:
    (height, width), (new_height, new_width) = image.shape[:2], out.shape[:2]
    if new_height * width >= new_width * height:  # the height fits, the width is cut
        full_height, full_width = new_height, int(new_height * width / height)
    else:
        full_height, full_width = int(new_width * height / width), new_width
    top, left = (full_height - new_height) // 2, (full_width - new_width) // 2
    if full_height * full_width <= 8 * new_height * new_width:
        full = PIL.Image.fromarray(image).resize((full_width, full_height), PIL.Image.Resampling.BICUBIC)
        out[:] = np.asarray(full)[top : top + new_height, left : left + new_width]
        return
    # A long strip: resizing only the visible part gives the same pixels, except that some differ by one level.
    x, y = width / full_width, height / full_height
    box = (left * x, top * y, (left + new_width) * x, (top + new_height) * y)
    strip = PIL.Image.fromarray(image).resize((new_width, new_height), PIL.Image.Resampling.BICUBIC, box)
    out[:] = np.asarray(strip)


def tiled_scaled(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) to which LLaVA's AnyRes resizes an image of `size` inside a box: rounded up."""
    y, x = box[0] / size[0], box[1] / size[1]
    if x < y:
        return min(math.ceil(size[0] * x), box[0]), box[1]
    return box[0], min(math.ceil(size[1] * y), box[1])


def _tiled(size: tuple[int, int], box: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns where the image of `tiled_scaled` lies in the box, centred: (top, bottom), (left, right), pixels."""
    scaled = tiled_scaled(size, box)
    return [((whole - part) // 2, (whole - part) // 2 + part) for whole, part in zip(box, scaled, strict=True)]


def _resize_exactly(image: np.ndarray, out: np.ndarray) -> None:
    height, width = out.shape[:2]
    out[:] = np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BICUBIC))
