"""Small pictures in every format that is read."""

import io
import struct
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def photo(height, width, seed=0):
    """A smooth picture with noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), PIL.Image.Resampling.BILINEAR)).astype(int)
    return (smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


PHOTO = PIL.Image.fromarray(photo(40, 60))


def png(pixels, bits, color, interlaced=False, chunks=()):
    """A PNG of `pixels` [H, W, C], which Pillow does not write as 16-bit colour or interlaced."""
    pixels = np.asarray(pixels, ">u2" if bits == 16 else "u1")
    height, width = pixels.shape[:2]
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b""
    for top, left, down, right in passes if interlaced else ((0, 0, 1, 1),):
        part = pixels[top::down, left::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in every)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[0x0112] = orientation
    return tags


def two_frames(**options):
    # New images: one that was saved as JPEG keeps settings that TIFF's writer trips over.
    return encode(PHOTO.copy(), save_all=True, append_images=[PIL.ImageOps.mirror(PHOTO)], **options)


def every_format():
    """Name, encoded PHOTO or a form of it."""
    grey, deep = PHOTO.convert("L"), np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    alpha = PHOTO.copy()
    alpha.putalpha(grey)
    yield from {
        "jpeg": encode(PHOTO, format="JPEG", quality=90, exif=exif(6)),
        "jpeg 4:2:0": encode(PHOTO, format="JPEG", subsampling=2),
        "jpeg progressive": encode(PHOTO, format="JPEG", progressive=True),
        "jpeg grey": encode(grey, format="JPEG"),
        "jpeg cmyk": encode(PHOTO.convert("CMYK"), format="JPEG"),
        "jpeg mpo": two_frames(format="MPO"),
        "png": encode(PHOTO, format="PNG", exif=exif(3)),
        "png grey": encode(grey, format="PNG"),
        "png 1 bit": encode(PHOTO.convert("1"), format="PNG"),
        "png palette": encode(PHOTO.quantize(16), format="PNG", transparency=3),
        "png alpha": encode(alpha, format="PNG"),
        "png grey alpha": encode(alpha.convert("LA"), format="PNG"),
        "png 16-bit grey": encode(PIL.Image.fromarray(deep), format="PNG"),
        "png 16-bit colour": png(np.asarray(PHOTO).astype(np.uint16) * 257, 16, 2),
        "png interlaced": png(np.asarray(alpha), 8, 6, interlaced=True),
        "png animated": two_frames(format="PNG"),
        "webp": encode(PHOTO, format="WEBP", exif=exif(8)),
        "webp lossless": encode(PHOTO, format="WEBP", lossless=True),
        "webp alpha": encode(alpha, format="WEBP", lossless=True, exact=True),
        "webp animated": two_frames(format="WEBP"),
        "gif": encode(PHOTO, format="GIF"),
        "gif animated": two_frames(format="GIF"),
        "tiff": encode(PHOTO, format="TIFF", exif=exif(6)),
        "tiff lzw": encode(PHOTO, format="TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(alpha, format="TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(PHOTO, format="TIFF", compression="jpeg"),
        "tiff 16-bit": encode(PIL.Image.fromarray(deep), format="TIFF"),
        "tiff palette": encode(PHOTO.quantize(16), format="TIFF"),
        "tiff cmyk": encode(PHOTO.convert("CMYK"), format="TIFF"),
        "tiff pages": two_frames(format="TIFF"),
        "bmp": encode(PHOTO, format="BMP"),
        "bmp palette": encode(PHOTO.quantize(16), format="BMP"),
    }.items()
    if PIL.features.check("avif"):
        yield "avif", encode(PHOTO, format="AVIF", exif=exif(6))


FORMATS = dict(every_format())
