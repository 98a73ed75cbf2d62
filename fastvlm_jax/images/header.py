"""Reads the format, size and orientation of an encoded image from its header, without decoding it."""

import contextlib
import ctypes
import io
import logging
import struct
import warnings
from typing import NamedTuple

import PIL.features
import PIL.Image
import simplejpeg

from fastvlm_jax.files import POINTER

MAX_BYTES = 256 << 20  # bytes of the file
# Twice a 50-megapixel camera. A file of a few kilobytes can claim any size, so the header is checked first.
MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768
_MAX_CHUNKS = 100_000  # per PNG or WebP: 800 MB as encoders write them, 5 seconds if empty
_MAX_RUN_LENGTH_BMP = 8_000_000  # bytes: Pillow decodes such a BMP in Python, at 5 MB a second
_MAX_GIF = 64 << 20  # bytes: Pillow reads what precedes the first picture of a GIF in Python, at 3 MB a second
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG
_ORIENTATION = 0x0112  # EXIF tag
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# A damaged file can make Pillow warn thousands of times, and one that cannot be decoded raises anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # Pillow's libtiff prints to stderr
    _library = ctypes.CDLL(PIL.Image.core.__file__)
    _library.TIFFSetErrorHandler(None)
    _library.TIFFSetWarningHandler(None)


class Header(NamedTuple):
    """Holds the header of an encoded image.

    Attributes:
      kind: format, such as "JPEG" or "WEBP".
      height, width: pixels before the rotation by `orientation`.
      orientation: EXIF orientation, 1 to 8; 5 to 8 exchange height and width.
      color: colour space of a JPEG in simplejpeg's spelling; "" for other formats.
    """

    kind: str
    height: int
    width: int
    orientation: int = 1
    color: str = ""

    @property
    def upright(self) -> tuple[int, int]:
        """Returns (height, width) after EXIF rotation."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


def read_header(data: bytes) -> Header:
    """Reads the header of an encoded image.

    Raises:
      ValueError: the image is empty, of an unknown format, larger than MAX_PIXELS or MAX_SIDE, or its header is broken.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes)")
    try:
        header = _read(data, _kind(data))
    except Exception as error:
        raise unreadable(error) from error
    width, height = header.width, header.height
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        error = f"{width} x {height} is more than {MAX_PIXELS:,} pixels, or {MAX_SIDE:,} along a side"
        raise ValueError(f"the image cannot be read: {error}")
    if not width or not height:
        raise ValueError(f"the image cannot be read: its size is {width} x {height}")
    return header


def _kind(data: bytes) -> str:
    """Returns the format by the first bytes; a ValueError names a format that cannot be read."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    brands = data[8:64] if data[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        if PIL.features.check("avif"):
            return "AVIF"
        raise ValueError("it is AVIF, which this Pillow cannot decode: convert it to JPEG or PNG")
    if any(brand in brands for brand in _HEIF_BRANDS):
        raise ValueError("it is HEIC: convert it to JPEG or PNG (heif-convert, ImageMagick)")
    if data.startswith(POINTER):
        raise ValueError("it is a Git LFS pointer and not the picture: run `git lfs pull` in its folder")
    if b"<svg" in data[:4096].lower():
        raise ValueError("it is SVG, a drawing without pixels: convert it to PNG")
    raise ValueError("not an image of a known format (JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF)")


def _read(data: bytes, kind: str) -> Header:
    if kind == "JPEG":
        height, width, color, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        return Header(kind, height, width, _orientation(_jpeg_exif(data)), color)
    if kind == "PNG":
        if data[12:16] != b"IHDR":
            raise ValueError("its header is broken")
        width, height = struct.unpack_from(">II", data, 16)
        return Header(kind, height, width, _orientation(chunk(data, 8, ">I4s", b"eXIf")))
    if kind == "WEBP":  # Pillow's reader would allocate the size that the header claims
        width, height = _webp_size(data)
        exif = chunk(data, 12, "<4sI", b"EXIF") if data[12:16] == b"VP8X" else b""
        return Header(kind, height, width, _orientation(exif.removeprefix(b"Exif\0\0")))
    if kind == "BMP" and data[30:31] in (b"\1", b"\2") and len(data) > _MAX_RUN_LENGTH_BMP:
        raise ValueError(
            f"it is a run-length encoded BMP of more than {_MAX_RUN_LENGTH_BMP:,} bytes: convert it to PNG"
        )
    if kind == "GIF" and len(data) > _MAX_GIF:
        raise ValueError(f"it is a GIF of more than {_MAX_GIF >> 20} MB: convert it to PNG")
    image = open_with_pillow(data, kind)
    width, height = image.size
    orientation = image.getexif().get(_ORIENTATION, 1) if kind == "AVIF" else 1  # Pillow itself rotates a TIFF
    return Header(kind, height, width, orientation if orientation in range(1, 9) else 1)


def open_with_pillow(data: bytes, kind: str) -> PIL.Image.Image:
    """Opens an image as the format `kind`; Pillow tries no other format and so never runs Ghostscript.

    Texts and the colour profile of a PNG are left out: no pixel depends on them, and Pillow refuses long ones.
    """
    return PIL.Image.open(io.BytesIO(_without_texts(data) if kind == "PNG" else data), formats=(kind,))


def _without_texts(data: bytes) -> bytes:
    """Returns a PNG without the chunks in _TEXTS, unread; what follows a broken chunk is left for the decoder."""
    kept, start, at = [], 0, 8
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name in _TEXTS and end <= len(data):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _jpeg_exif(data: bytes) -> bytes:
    """Returns the TIFF structure in the Exif segment of a JPEG; empty if there is none."""
    at = 2
    for _ in range(1000):  # most segments to search
        marker = data[at : at + 2]
        if len(marker) < 2 or marker[0] != 0xFF or marker[1] in (0xD9, 0xDA):  # the end, or the pixels
            break
        if marker[1] == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker[1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 10 : end]
        at = end
    return b""


def chunk(data: bytes, at: int, form: str, name: bytes) -> bytes:
    """Returns the body of the chunk `name` of a PNG or WebP; empty if there is none.

    Args:
      data: bytes of the file.
      at: offset of the first chunk, bytes.
      form: struct format of a chunk's head: ">I4s" for PNG, "<4sI" for WebP.
      name: name of the chunk, 4 bytes.

    Raises:
      ValueError: the file has too many chunks.
    """
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return b""
        first, second = struct.unpack_from(form, data, at)
        kind, length = (first, second) if form == "<4sI" else (second, first)
        if kind == name:
            return data[at + 8 : at + 8 + length]
        at += 8 + (length + length % 2 if form == "<4sI" else length + 4)
    raise ValueError(f"it has more than {_MAX_CHUNKS:,} chunks")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("its header is broken")


def _orientation(exif: bytes) -> int:
    """Returns the orientation in a TIFF structure, 1 to 8; 1 if it is missing or malformed."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(count):
            tag, kind = struct.unpack_from(f"{order}HH", exif, at + 2 + 12 * entry)
            if tag == _ORIENTATION:
                form = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
                (value,) = struct.unpack_from(order + form, exif, at + 10 + 12 * entry)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def unreadable(error: Exception) -> ValueError:
    """Returns a ValueError whose message says in one line why an image cannot be read."""
    reason = str(error) or type(error).__name__
    if isinstance(error, PIL.UnidentifiedImageError):
        reason = "its header is broken"
    elif reason.removeprefix("decoder error ").lstrip("-").isdigit():
        reason = "its pixels are damaged"
    return ValueError(" ".join(f"the image cannot be read: {reason}".split()))
