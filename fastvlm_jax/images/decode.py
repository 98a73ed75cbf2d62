"""Decodes images to uint8 arrays and to the views that a model sees, and re-encodes large images smaller."""

import io
import re

import cv2
import numpy as np
import PIL.Image
import simplejpeg

from fastvlm_jax.images.header import MAX_SIDE, Header, chunk, open_with_pillow, read_header, unreadable
from fastvlm_jax.images.modes import shrink_with_alpha, to_array, to_rgb
from fastvlm_jax.images.resize import crop_scaled, fit_into, pad_scaled, resize, room_for, tiled_scaled, tiles_into

__all__ = ["MAX_SIDE", "decode", "decode_with_alpha", "fit_into", "shrink", "size_of", "upright", "views_into"]

# Decoding a scan of a progressive JPEG visits every pixel, even if the scan is an empty one of 10 bytes. Encoders write
# about 10 scans.
MAX_SCANS = 100
# Warnings of the JPEG decoder that lose no pixel: odd bytes between the segments before the pixels.
_HARMLESS = re.compile(r"extraneous bytes before marker 0x(e.|db|fe|c[012])|JFIF revision|Adobe color transform")


def size_of(data: bytes) -> tuple[int, int]:
    """Returns (width, height) of an encoded image after EXIF rotation, from its header alone.

    Raises:
      ValueError: the image is empty, of an unknown format, larger than MAX_PIXELS or MAX_SIDE, or its header is broken.
    """
    height, width = read_header(data).upright
    return width, height


def decode(data: bytes, at_least: tuple[int, int] | None = None, transparency: str = "white") -> np.ndarray:
    """Decodes an encoded image (JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF) to uint8 [H, W, 3].

    EXIF rotation is applied, 16-bit channels keep their high byte, and an animation or a TIFF of several pages gives
    the first frame or page.

    Args:
      data: bytes of the file.
      at_least: smallest sufficient (height, width), pixels. A JPEG is then decoded at the smallest of the scales 1/1,
        1/2, 1/4 and 1/8 that is no smaller, which saves time. None decodes at full size.
      transparency: "white" or "drop", see `to_rgb`.

    Raises:
      ValueError: the image is empty, of an unknown format, truncated, damaged, or larger than MAX_PIXELS or MAX_SIDE.
    """
    return to_rgb(decode_with_alpha(data, at_least), transparency)


def decode_with_alpha(data: bytes, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an image as `decode` does, but to uint8 [H, W, 4] if a pixel is not opaque; see `to_array`."""
    header = read_header(data)
    try:
        if header.kind == "JPEG":
            image = _decode_jpeg(data, header, at_least)
        else:
            image = to_array(open_with_pillow(data, header.kind))
            if image.shape[:2] != (header.height, header.width):
                raise ValueError("its header and its pixels disagree about its size")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on bad bytes
        raise unreadable(error) from error
    return _make_upright(image, header.orientation)


def views_into(
    data: bytes,
    out: np.ndarray,
    grid: tuple[int, int] = (0, 0),
    mode: str = "pad",
    background: tuple[int, int, int] = (0, 0, 0),
    exact: bool = False,
    transparency: str = "white",
) -> None:
    """Decodes an image and writes the views of it that a model sees: an overview and, with a grid, tiles (AnyRes).

    For a 2 x 2 grid, `out` holds five views of the same H x W:

        out[0]  the whole image, fitted by `fit_into`
        out[1]  out[2]     the image padded with black to 2H x 2W, cut into tiles
        out[3]  out[4]

    Args:
      data: bytes of the file.
      out: uint8 [1 + rows * columns, H, W, 3]. Every pixel is written.
      grid: (rows, columns) of tiles; (0, 0) gives the overview alone.
      mode: how the overview is fitted: pad, crop or stretch, see `fit_into`. LLaVA and FastVLM stretch it for AnyRes.
      background: RGB colour around the overview.
      exact: whether to give the pixels of LLaVA's and FastVLM's `process_anyres_image` instead of the fast path's.
      transparency: "white" or "drop", see `to_rgb`.

    Raises:
      ValueError: as for `decode`, or `out` has another number of views.
    """
    rows, columns = grid
    views = 1 + rows * columns
    if out.ndim != 4 or len(out) != views:
        raise ValueError(f"a grid of {rows} x {columns} needs {views} views, but out is {list(out.shape)}")
    at_least = None
    if not exact:
        at_least = enough(data, out.shape[1:3], grid, mode)
        if views == 1 and mode == "pad" and _decode_into(data, at_least, out[0], background):
            return
    image = decode(data, at_least, transparency)
    fit_into(image, out[0], mode, background, exact)
    if views > 1:
        tiles_into(image, out[1:], grid, exact)


def enough(data: bytes, box: tuple[int, int], grid: tuple[int, int], mode: str) -> tuple[int, int]:
    """Returns the smallest (height, width) at which to decode an image for its views, each of size `box`, in pixels."""
    size, (height, width), (rows, columns) = read_header(data).upright, box, grid
    wanted = crop_scaled(size, box) if mode == "crop" else pad_scaled(size, box)
    wanted = box if mode == "stretch" else wanted
    tiled = (0, 0) if grid == (0, 0) else tiled_scaled(size, (rows * height, columns * width))
    return max(wanted[0], tiled[0]), max(wanted[1], tiled[1])


def shrink(data: bytes, max_side: int, quality: int = 92) -> bytes:
    """Re-encodes an image with a longer side of `max_side` pixels; returns `data` itself if its sides are no longer.

    JPEG, AVIF and lossy WebP become upright JPEG (4:4:4) without EXIF. Other formats, and images that are not opaque,
    become upright PNG, which keeps the transparency.

    Raises:
      ValueError: as for `decode`.
    """
    header = read_header(data)
    size = header.upright
    if max(size) <= max_side:
        return data
    height, width = (max(1, round(side * max_side / max(size))) for side in size)
    pixels = decode_with_alpha(data, (height, width))
    if pixels.shape[2] == 4:
        return _encoded(shrink_with_alpha(pixels, height, width), data, header, quality)
    small = np.empty((height, width, 3), np.uint8)
    resize(pixels, small)
    return _encoded(small, data, header, quality)


def upright(data: bytes, quality: int = 95) -> bytes:
    """Returns an image as an upright JPEG, PNG or WebP: `data` itself if it is one, else encoded anew as by `shrink`.

    Raises:
      ValueError: as for `decode`.
    """
    header = read_header(data)
    if header.kind in ("JPEG", "PNG", "WEBP") and header.orientation == 1:
        return data
    return _encoded(decode_with_alpha(data), data, header, quality)


def _encoded(pixels: np.ndarray, data: bytes, header: Header, quality: int) -> bytes:
    """Returns pixels that were decoded from `data` as JPEG if that was lossy, as PNG if not or if they show through."""
    lossy = header.kind in ("JPEG", "AVIF") or (header.kind == "WEBP" and not chunk(data, 12, "<4sI", b"VP8L"))
    if pixels.shape[2] == 4 or not lossy:
        return _as_png(pixels)
    if header.color == "Gray":
        grey = np.ascontiguousarray(pixels[..., :1])
        return simplejpeg.encode_jpeg(grey, quality, "GRAY", "Gray", fastdct=False)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444", fastdct=False)


def _as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _decode_jpeg(data: bytes, header: Header, at_least: tuple[int, int] | None) -> np.ndarray:
    if _count_scans(data) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")
    color = "CMYK" if header.color in ("CMYK", "YCCK") else "RGB"
    limits = {} if at_least is None else _scale(header, at_least)
    try:
        # simplejpeg is strict by default: a damaged file raises instead of ending in grey.
        image = simplejpeg.decode_jpeg(data, color, **limits)
    except ValueError as error:
        if not _HARMLESS.search(str(error)):
            raise
        return to_array(open_with_pillow(data, "JPEG"))  # raises if the file is truncated
    if color == "CMYK":  # stored inverted, like all CMYK JPEGs
        size = image.shape[1::-1]
        return np.asarray(PIL.Image.frombytes("CMYK", size, (255 - image).tobytes()).convert("RGB"))
    return image


def _decode_into(data: bytes, at_least: tuple[int, int], out: np.ndarray, background: tuple[int, int, int]) -> bool:
    """Decodes a plain JPEG that needs no resizing straight into `out`; returns False for any other image."""
    header = read_header(data)
    if header.kind != "JPEG" or header.orientation != 1 or header.color in ("CMYK", "YCCK"):
        return False
    limits = _scale(header, at_least)
    room = room_for(out, (limits["min_height"], limits["min_width"]), background)
    if room is None or _count_scans(data) > MAX_SCANS:
        return False
    try:
        simplejpeg.decode_jpeg(data, "RGB", buffer=room.reshape(-1), **limits)
    except ValueError:  # `decode` finds out whether the file is damaged
        return False
    return True


def _scale(header: Header, at_least: tuple[int, int]) -> dict[str, int]:
    """Returns simplejpeg's arguments for the smallest sufficient size, which is exactly the size that it gives."""
    height, width = at_least[::-1] if header.orientation > 4 else at_least
    for factor in (8, 4, 2, 1):  # only these scales have fast code in libjpeg-turbo
        size = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
        if size["min_height"] >= height and size["min_width"] >= width:
            break
    return size


def _count_scans(data: bytes) -> int:
    """Counts start-of-scan marks, FF DA, at even and odd offsets: 5 times as fast as `bytes.count`, without the GIL."""
    places = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(pairs == 0xDAFF)) for pairs in places)


def _make_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation, 1 to 8."""
    if orientation in (5, 7):
        image = cv2.transpose(image)
    elif orientation in (6, 8):
        image = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE if orientation == 6 else cv2.ROTATE_90_COUNTERCLOCKWISE)
    flip = {2: 1, 3: -1, 4: 0, 7: -1}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)
