"""Encoded images to square uint8 arrays."""

import contextlib
import io
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

# Twice a 50-megapixel camera. A few kilobytes can claim any size, so the header is read first.
MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768  # padding to a square costs the square of this: 10 seconds
EXIF_ORIENTATION = 0x0112
_ROWS = 256  # rows resized at a time: a 500 x 30,000 image is never held as a 30,000 x 30,000 one

# MAX_PIXELS takes the place of Pillow's own warning.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


def decode(data: bytes) -> np.ndarray:
    """Decodes an encoded image (JPEG, PNG, WebP, GIF, BMP, TIFF ...) to uint8 [H, W, 3].

    EXIF rotation is applied, transparency is shown over black, 16-bit grey keeps its high byte, an animation gives its
    first frame.

    Raises:
      ValueError: empty, unreadable, cut short, or larger than MAX_PIXELS or MAX_SIDE.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    try:
        image = PIL.Image.open(io.BytesIO(data))  # reads the header only
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels, or {MAX_SIDE:,} along a side")
        if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(EXIF_ORIENTATION, 1) == 1:
            # The same pixels in half the time. It stops at warnings that Pillow rightly lets pass.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on bad bytes
        reason = "not an image of a known format" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise ValueError(f"the image cannot be read: {reason}".replace("\n", " ")) from error


def _to_rgb(image: PIL.Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def pad_to_square(image: np.ndarray, size: int, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Centres uint8 [H, W, 3] on a square of one colour and resizes it to uint8 [size, size, 3], Pillow bicubic.

    The pixels equal those of transformers' CLIPImageProcessor set up as FastVLM's after LLaVA's `expand2square`.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    # Pillow resizes along rows first and then along columns, rounding between: so may we; one-coloured rows stay.
    narrow = np.full((side, size, 3), background, np.uint8)
    for row in range(0, height, _ROWS):
        rows = image[row : row + _ROWS]
        square = np.full((len(rows), side, 3), background, np.uint8)
        square[:, left : left + width] = rows
        narrow[top + row : top + row + len(rows)] = _resize(square, (size, len(rows)))
    return _resize(narrow, (size, size))


def _resize(image: np.ndarray, width_height: tuple[int, int]) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(image).resize(width_height, PIL.Image.Resampling.BICUBIC))
