"""uint8 images resized into place: padded, cropped, stretched or cut into tiles; Pillow's pixels or OpenCV's speed."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import PIL.Image

cv2.setNumThreads(1)  # the pipeline's own threads use the cores

Background = tuple[int, int, int]
_ROWS = 256  # rows resized at a time: a 500 x 30,000 image is never held as a 30,000 x 30,000 one


def fit_into(
    image: np.ndarray, out: np.ndarray, mode: str = "pad", background: Background = (0, 0, 0), exact: bool = False
) -> None:
    """Resizes an image into `out`, every pixel of which is written.

        pad      the whole image, its aspect kept, centred on `background` (LLaVA's `expand2square` for a square)
        crop     the image covers `out`, its aspect kept, its centre shown (CLIP's shortest edge and centre crop)
        stretch  the whole image fills `out`, its aspect lost (LLaVA's overview for AnyRes)

    Args:
      image: uint8 [h, w, 3].
      out: uint8 [H, W, 3], may be a view with whole pixels in rows.
      mode: pad, crop or stretch.
      background: RGB.
      exact: Pillow's bicubic, the pixels of transformers' CLIPImageProcessor. Otherwise OpenCV's: means of areas where
        the image gets smaller, cubic where it grows, placed within half a pixel of the exact ones.

    Raises:
      ValueError: an unknown mode.
    """
    if mode == "stretch":
        (_resize_exactly if exact else resize)(image, out)
    elif mode == "pad":
        (_pad_exactly if exact else _pad)(image, out, background)
    elif mode == "crop":
        (_crop_exactly if exact else _crop)(image, out)
    else:
        raise ValueError(f"unknown mode {mode!r} to fit images: choose pad, crop or stretch")


def tiles_into(
    image: np.ndarray, out: np.ndarray, grid: tuple[int, int], background: Background = (0, 0, 0), exact: bool = False
) -> None:
    """Pads an image to rows * H x columns * W and writes its tiles, row by row.

    Exact tiles equal those of LLaVA and FastVLM (`resize_and_pad_image`, `divide_to_patches`), whose background is
    black.

    Args:
      image: uint8 [h, w, 3].
      out: uint8 [rows * columns, H, W, 3].
      grid: (rows, columns).
      background: RGB.
      exact: see `fit_into`.
    """
    rows, columns = grid
    _, height, width, _ = out.shape
    canvas = np.empty((rows * height, columns * width, 3), np.uint8)
    inside = _letterbox(canvas, _tiled(image.shape[:2], canvas.shape[:2]), background)
    (_resize_exactly if exact else resize)(image, inside)
    out.reshape(rows, columns, height, width, 3)[:] = canvas.reshape(rows, height, columns, width, 3).swapaxes(1, 2)


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Resizes uint8 [h, w, 3] into uint8 [H, W, 3] with OpenCV."""
    (height, width), (new_height, new_width) = image.shape[:2], out.shape[:2]
    if (height, width) == (new_height, new_width):
        out[:] = image
        return
    # Against Pillow's bicubic on photos: means of areas come nearest (43 to 46 dB) from a factor of 1.2 on, where cubic
    # aliases; below it and where the image grows cubic does (47 to 49 dB).
    smaller = max(height / new_height, width / new_width) > 1.2
    if smaller and (height < new_height or width < new_width):  # one side each way: one after the other
        middle = np.empty((min(height, new_height), min(width, new_width), 3), np.uint8)
        resize(image, middle)
        image, smaller = middle, False
    cv2.resize(image, (new_width, new_height), dst=out, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def pad_scaled(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) at which an image fits a box."""
    (top, bottom), (left, right) = _placed(size, box)
    return bottom - top, right - left


def crop_scaled(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) at which an image covers a box."""
    scale = max(box[0] / size[0], box[1] / size[1])
    return max(box[0], int(size[0] * scale)), max(box[1], int(size[1] * scale))


def _centred(length: float, whole: int) -> int:
    """The integer nearest to `length` that leaves an even rest of `whole`: no half pixel of shift."""
    return min(whole, max(whole - 2 * round((whole - length) / 2), 1 + (whole + 1) % 2))


def _canvas(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) that have the aspect of `box` and as few pixels around the image as that allows."""
    return max(size[0], round(size[1] * box[0] / box[1])), max(size[1], round(size[0] * box[1] / box[0]))


def _placed(size: tuple[int, int], box: tuple[int, int]) -> list[tuple[int, int]]:
    """Where in a box the image ends up if its canvas is resized to it: (top, bottom), (left, right), whole pixels."""
    edges = []
    for length, canvas, new in zip(size, _canvas(size, box), box, strict=True):
        before = (canvas - length) // 2
        first = min(round(before * new / canvas), new - 1)
        edges.append((first, max(first + 1, round((before + length) * new / canvas))))
    return edges


def _letterbox(out: np.ndarray, edges: Sequence[tuple[int, int]], background: Background) -> np.ndarray:
    """Paints what is outside of (top, bottom), (left, right) and returns what is inside, a view."""
    (top, bottom), (left, right) = edges
    for border in (out[:top], out[bottom:], out[top:bottom, :left], out[top:bottom, right:]):
        if border.size:  # 40 times faster than numpy
            cv2.rectangle(border, (0, 0), border.shape[1::-1], background, cv2.FILLED)
    return out[top:bottom, left:right]


def room_for(out: np.ndarray, size: tuple[int, int], background: Background) -> np.ndarray | None:
    """Returns the part of `out` that an image of that size fills unresized, its borders painted; None if it does not.

    It is one piece of memory: an image that is as wide as `out`.
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
    # Pillow resizes along rows first and then along columns, rounding between: so may we; one-coloured rows stay.
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
    # A long strip: the same pixels but for single steps, without resizing what is cut off.
    x, y = width / full_width, height / full_height
    box = (left * x, top * y, (left + new_width) * x, (top + new_height) * y)
    strip = PIL.Image.fromarray(image).resize((new_width, new_height), PIL.Image.Resampling.BICUBIC, box)
    out[:] = np.asarray(strip)


def tiled_scaled(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that LLaVA's AnyRes gives an image inside a box: rounded up."""
    y, x = box[0] / size[0], box[1] / size[1]
    if x < y:
        return min(math.ceil(size[0] * x), box[0]), box[1]
    return box[0], min(math.ceil(size[1] * y), box[1])


def _tiled(size: tuple[int, int], box: tuple[int, int]) -> list[tuple[int, int]]:
    """Where that is: (top, bottom), (left, right)."""
    scaled = tiled_scaled(size, box)
    return [((whole - part) // 2, (whole - part) // 2 + part) for whole, part in zip(box, scaled, strict=True)]


def _resize_exactly(image: np.ndarray, out: np.ndarray) -> None:
    height, width = out.shape[:2]
    out[:] = np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BICUBIC))
