import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg
from paths import HELPERS, ROOT
from pictures import FORMATS, PHOTO, chunk, encode, exif, photo, png

from fastvlm_jax.images.decode import MAX_SCANS, decode, enough, fit_into, shrink, size_of, upright, views_into

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def by_pillow(data):
    """Decodes an image by Pillow, over white; 16-bit grey keeps its high byte."""
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    if image.mode == "I;16":
        return np.repeat((np.asarray(image) >> 8)[..., None], 3, 2).astype(np.uint8)
    rgba = image.convert("RGBA")
    return np.asarray(PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_equals_pillow(name):
    expected = by_pillow(FORMATS[name])
    ours = decode(FORMATS[name])
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, expected)
    assert size_of(FORMATS[name]) == expected.shape[1::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientations_equal_pillow(orientation, mode):
    data = encode(PHOTO.convert(mode), format="JPEG", exif=exif(orientation))
    np.testing.assert_array_equal(decode(data), by_pillow(data))
    assert size_of(data) == ((60, 40) if orientation < 5 else (40, 60))
    scaled = decode(data, (20, 30) if orientation < 5 else (30, 20))
    assert scaled.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    smaller = PIL.Image.fromarray(by_pillow(data)).reduce(2)
    assert abs(scaled.astype(int) - np.asarray(smaller)).mean() < 4


def test_a_rotated_image_is_turned_clockwise_by_orientation_6():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # white on the left: left becomes top
    turned = decode(encode(PIL.Image.fromarray(image), format="JPEG", exif=exif(6)))
    assert turned.shape == (32, 16, 3)
    assert turned[:14].min() > 250 and turned[18:].max() < 5


def test_orientation_of_a_webp_is_found_behind_an_odd_chunk_and_a_prefix():
    data = encode(PHOTO, format="WEBP", exif=exif(6), icc_profile=b"odd")
    at = data.index(b"EXIF")
    body = b"Exif\0\0" + data[at + 8 :]
    prefixed = data[:at] + b"EXIF" + struct.pack("<I", len(body)) + body
    prefixed = b"RIFF" + struct.pack("<I", len(prefixed) - 8) + prefixed[8:]
    for form in (data, prefixed):
        assert size_of(form) == (40, 60)
        np.testing.assert_array_equal(decode(form), by_pillow(form))


@pytest.mark.parametrize(
    "at_least, shape",
    [
        ((60, 90), (60, 90)),  # 1/2
        ((61, 60), (120, 180)),
        ((30, 45), (30, 45)),  # 1/4
        ((1, 1), (15, 23)),  # 1/8, rounded up
        ((121, 10), (120, 180)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_decoded_no_smaller_than_asked(mode, at_least, shape):
    data = encode(PIL.Image.fromarray(photo(120, 180)).convert(mode), format="JPEG", quality=95)
    image = decode(data, at_least)
    assert image.shape == (*shape, 3)
    assert abs(image.mean((0, 1)) - decode(data).mean((0, 1))).max() < 2


def test_transparency_is_shown_over_white():
    rgba = np.full((2, 2, 4), 200, np.uint8)
    rgba[..., 3] = [[0, 255], [51, 255]]
    expected = [[[255] * 3, [200] * 3], [[244] * 3, [200] * 3]]  # 51 / 255 * 200 + 204 / 255 * 255
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert decode(encode(PIL.Image.fromarray(rgba), format=kind, **options)).tolist() == expected


def test_palette_and_grey_modes():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2).tolist()
    assert decode(encode(PIL.Image.fromarray(grey), format="PNG")).tolist() == rgb
    for kind in ("PNG", "TIFF"):
        wide = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
        assert decode(encode(wide, format=kind)).tolist() == rgb
    palette = PIL.Image.fromarray(grey).convert("P")
    assert decode(encode(palette, format="PNG")).tolist() == rgb
    clear = palette.getpixel((1, 1))
    rgb[1][1] = [255, 255, 255]
    assert decode(encode(palette, format="PNG", transparency=clear)).tolist() == rgb


def test_sixteen_bit_channels_keep_their_high_byte():
    pixels = [[[0x1234, 0xFF00, 0x00FF]]]
    assert decode(png(pixels, 16, 2)).tolist() == [[[0x12, 0xFF, 0x00]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_the_first_is_shown(kind):
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], format=kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_harmless_warnings_of_the_jpeg_decoder_lose_no_image():
    data = encode(PHOTO, format="JPEG")
    expected = decode(data)
    between = data[:20] + b"\0\0odd" + data[20:]
    for odd in (between, data + b"after the end"):
        np.testing.assert_array_equal(decode(odd), expected)
    with pytest.raises(ValueError, match="truncated"):
        decode(between[:-200])


def bomb(width, height):
    """Returns a PNG of a few bytes that claims to have this size."""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"\0\0\0\0IDAT"
    )


def webp_bomb(kind):
    body = {
        b"VP8X": bytes(4) + b"\xff\xff\x03" * 2,
        b"VP8L": b"\x2f\xff\xff\xff\xff",
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f",
    }[kind]
    return b"RIFF" + struct.pack("<I", 100) + b"WEBP" + kind + struct.pack("<I", len(body)) + body + bytes(80)


def jpeg_bomb(width, height):
    data = FORMATS["jpeg 4:2:0"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif_bomb(width, height):
    return b"GIF89a" + struct.pack("<HH", width, height) + FORMATS["gif"][10:]


def bmp_bomb(width, height):
    return FORMATS["bmp"][:18] + struct.pack("<ii", width, height) + FORMATS["bmp"][26:]


def tiff_bomb(width, height):
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height), (279, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "data, words",
    [
        (bomb(10_001, 10_000), "10001 x 10000 is more than 100,000,000 pixels"),
        (bomb(40_000, 1), "40000 x 1 is more than .* 32,768 along a side"),
        (bomb(60_000, 60_000), "60000 x 60000 is more than"),
        (bomb(0, 10), "its size is 0 x 10"),
        (jpeg_bomb(60_000, 60_000), "60000 x 60000 is more than"),
        (webp_bomb(b"VP8X"), "262144 x 262144 is more than"),
        (webp_bomb(b"VP8L"), "16384 x 16384 is more than"),
        (webp_bomb(b"VP8 "), "16383 x 16383 is more than"),
        (gif_bomb(60_000, 2_000), "60000 x 2000 is more than"),
        (bmp_bomb(10_001, 10_000), "10001 x 10000 is more than"),
        (tiff_bomb(10_001, 10_000), "10001 x 10000 is more than"),
        (b"", "empty"),
        (b"not an image at all", "not an image of a known format"),
        (b"<?xml version='1.0'?>\n<svg width='9'></svg>", "SVG.* convert it to PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: convert it"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC: convert it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),  # Ghostscript
        (b"\xff\xd8\xff\xe0 broken", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "its header is broken"),
        (b"RIFF\0\0\0\0WEBP", "its header is broken"),
        (b"GIF89a", "cannot be read"),
        (b"II*\0", "cannot be read"),
        (b"BM", "cannot be read"),
    ],
)
def test_what_a_header_says_is_refused_before_decoding(data, words):
    for function in (size_of, decode):
        with pytest.raises(ValueError, match=words) as caught:
            function(data)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_floating_point_pixels_are_refused():
    image = PIL.Image.fromarray(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10))
    with pytest.raises(ValueError, match="its pixels are floating-point numbers"):  # Pillow would show black
        decode(encode(image, format="TIFF"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_short_is_refused(name):
    data = FORMATS[name]
    frames = 2 if name.endswith(("animated", "pages", "mpo")) else 1
    for share in (0.1, 0.4, 0.7):
        with pytest.raises(ValueError, match="cannot be read"):
            decode(data[: int(len(data) / frames * share)])


def test_damaged_jpeg_is_refused_where_pillow_shows_grey():
    data = encode(PIL.Image.fromarray(photo(200, 300)), format="JPEG")
    start = data.index(b"\xff\xda") + 20
    damaged = data[: start + 4000] + b"\xff\xd9"
    assert (np.asarray(PIL.Image.open(io.BytesIO(damaged)))[-20:] == 128).mean() > 0.3
    with pytest.raises(ValueError, match="premature end of data segment"):
        decode(damaged)


def scan_bomb(side, scans):
    """Returns a progressive JPEG whose further scans cover the whole image and add nothing."""
    table = b"\xff\xdb\0\x43\0" + bytes([1] * 64)
    codes = b"\xff\xc4\0\x14\0" + bytes([1] + [0] * 15) + b"\0"  # one code per table: zero, and a run of blocks
    codes += b"\xff\xc4\0\x14\x10" + bytes([1] + [0] * 15) + b"\xe0"
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\1\x11\0"
    blocks = (side // 8) ** 2
    first = b"\xff\xda\0\x08\1\1\0\0\0\0" + bytes(blocks // 8 + 2)
    runs = -(-blocks // 16384)
    further = b"\xff\xda\0\x08\1\1\0\1\1\0" + bytes(runs * 15 // 8 + 1)
    return b"\xff\xd8" + table + frame + codes + first + further * scans + b"\xff\xd9"


def test_work_beyond_the_pixels_is_bounded():
    good = zlib.compress((b"\0" + bytes(3)) * 1)
    huge = zlib.compress(bytes(50_000_000))
    black = np.zeros((1, 1, 3), np.uint8)
    bombs = {
        "more than 100 scans": scan_bomb(1600, MAX_SCANS + 1),
        "more than 100,000 chunks": png(black, 8, 2, chunks=[(b"abCd", b"")] * 100_000),
        "run-length encoded BMP": FORMATS["bmp"][:30] + b"\1" + FORMATS["bmp"][31:] + bytes(8_000_000),
    }
    for words, data in bombs.items():
        start = time.perf_counter()
        with pytest.raises(ValueError, match=words):
            decode(data)
        assert time.perf_counter() - start < 5
    for name, body in ((b"zTXt", b"a\0\0" + huge), (b"iCCP", b"a\0\0" + huge)):  # left out, and never decompressed
        start = time.perf_counter()
        assert decode(png(black, 8, 2, chunks=[(name, body)] * 100)).shape == (1, 1, 3)
        assert time.perf_counter() - start < 0.5
    assert decode(scan_bomb(160, 20)).shape == (160, 160, 3)
    assert decode(png(black, 8, 2, chunks=[(b"IDAT", good)])).shape == (1, 1, 3)


def mutations(data, others, rng):
    """Yields damaged forms of one file."""
    length = len(data)
    for share in rng.random(3):
        yield data[: int(length * share)]
    for _ in range(6):  # flipped bits
        flipped = bytearray(data)
        for at in rng.integers(0, length, rng.integers(1, 4)):
            flipped[at] ^= 1 << rng.integers(8)
        yield bytes(flipped)
    for _ in range(3):  # flipped bits of the header
        flipped = bytearray(data)
        flipped[rng.integers(0, min(length, 64))] ^= 1 << rng.integers(8)
        yield bytes(flipped)
    other = others[rng.integers(len(others))]
    at, size = rng.integers(0, length), rng.integers(1, 60)
    yield other[:32] + data[32:]
    yield data[:at] + other[at:]
    yield data[:at] + bytes(size) + data[at + size :]
    yield data[:at] + b"\xff" * 4 + data[at + 4 :]
    yield data[:at] + rng.bytes(size) + data[at:]
    yield data[:at] + data[at + size :]
    yield data[:at] + data


def test_damaged_files_give_an_image_or_one_line(capfd, recwarn, caplog):
    rng = np.random.default_rng(0)
    tried, refused = 0, 0
    for data in FORMATS.values():
        for damaged in mutations(data, list(FORMATS.values()), rng):
            tried += 1
            start = time.perf_counter()
            try:
                image = decode(damaged)
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
                assert size_of(damaged) == image.shape[1::-1]
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 300
            assert time.perf_counter() - start < 5
    assert tried >= 600 and refused > tried / 3
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and not caplog.records


PRINTS = """
from pictures import FORMATS
from fastvlm_jax.images.decode import decode
for data in FORMATS.values():
    for share in (0.2, 0.5, 0.8):
        try:
            decode(data[: int(len(data) * share)])
        except ValueError:
            pass
"""


def test_damaged_files_print_nothing():
    # pytest replaces the warning filters of the package, so this test runs a program of its own.
    path = os.pathsep.join([str(HELPERS), str(ROOT)])
    command = [sys.executable, "-c", PRINTS]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert result.stdout + result.stderr == ""


@pytest.mark.parametrize("width, height", [(1, 1), (20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_thin_images_decode(kind, width, height):
    if kind == "WEBP":  # its sides are at most 16,383
        width, height = min(width, 16_383), min(height, 16_383)
    data = encode(PIL.Image.new("RGB", (width, height), "white"), format=kind)
    assert size_of(data) == (width, height)
    assert decode(data).shape == (height, width, 3) and decode(data, (8, 8)).min() > 250


@pytest.mark.parametrize("name", ["jpeg", "jpeg grey", "jpeg cmyk", "webp", "webp lossless", "png alpha", "gif", "bmp"])
def test_shrink_keeps_the_aspect_and_the_picture(name):
    data = FORMATS[name]
    small = shrink(data, 30)
    assert PIL.Image.open(io.BytesIO(small)).format == ("JPEG" if "jpeg" in name or name == "webp" else "PNG")
    full = decode(data)
    assert max(size_of(small)) == 30 and decode(small).shape == (full.shape[0] // 2, full.shape[1] // 2, 3)
    expected = PIL.Image.fromarray(full).resize(size_of(small), PIL.Image.Resampling.BICUBIC)
    assert abs(decode(small).astype(int) - np.asarray(expected)).mean() < 5
    if name == "jpeg":
        assert simplejpeg.decode_jpeg_header(small)[3] == "444"
    if name == "jpeg grey":
        assert simplejpeg.decode_jpeg_header(small)[2] == "Gray"


def test_shrink_returns_what_is_small_enough_as_it_is():
    for data in FORMATS.values():
        assert shrink(data, 60) is data
    assert size_of(shrink(encode(PIL.Image.new("RGB", (2_000, 1)), format="PNG"), 100)) == (100, 1)
    with pytest.raises(ValueError, match="known format"):
        shrink(b"text", 9)


@pytest.mark.parametrize("name", FORMATS)
def test_upright_keeps_every_picture_that_is_one_and_encodes_others_anew(name):
    data, stored = FORMATS[name], upright(FORMATS[name])
    before, after = PIL.Image.open(io.BytesIO(data)), PIL.Image.open(io.BytesIO(stored))
    turned = before.getexif().get(0x0112, 1) != 1
    assert (stored is data) == (before.format in ("JPEG", "MPO", "PNG", "WEBP") and not turned)
    assert upright(stored) is stored and after.getexif().get(0x0112, 1) == 1
    if stored is not data:
        lossy = before.format in ("JPEG", "AVIF") or name == "webp"
        assert after.format == ("JPEG" if lossy else "PNG")
        difference = np.abs(by_pillow(data).astype(int) - by_pillow(stored))
        assert difference.mean() < 3 if lossy else difference.max() == 0
    if name == "jpeg":
        assert simplejpeg.decode_jpeg_header(stored)[3] == "444"
        assert simplejpeg.decode_jpeg(stored).shape == (60, 40, 3)


def test_a_lossy_picture_that_shows_through_becomes_png():
    """JPEG has no transparency: a turned WebP, and one that is shrunk."""
    alpha = PHOTO.copy()
    alpha.putalpha(PHOTO.convert("L"))
    for stored in (
        upright(encode(alpha, format="WEBP", exif=exif(3))),
        shrink(encode(alpha, format="WEBP"), 30),
    ):
        image = PIL.Image.open(io.BytesIO(stored))
        assert (image.format, image.mode) == ("PNG", "RGBA") and image.getextrema()[3][0] < 250


@pytest.mark.parametrize("width, height", [(64, 48), (128, 96), (127, 95), (64, 64), (48, 64), (60, 40), (300, 200)])
def test_what_is_decoded_in_place_is_what_is_decoded_and_then_placed(width, height):
    data = simplejpeg.encode_jpeg(photo(height, width), quality=90)
    background = (7, 8, 9)
    found, expected = np.full((1, 64, 64, 3), 99, np.uint8), np.full((64, 64, 3), 55, np.uint8)
    views_into(data, found, background=background)
    fit_into(decode(data, enough(data, (64, 64), (0, 0), "pad")), expected, "pad", background)
    np.testing.assert_array_equal(found[0], expected)
    for cut in (data[:-20], data[: len(data) // 2]):
        with pytest.raises(ValueError, match="the image cannot be read"):
            views_into(cut, found, background=background)


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("name", ["tEXt", "zTXt", "iTXt", "iCCP"])
def test_a_png_with_long_texts_is_decoded(name, where):
    """Beyond Pillow's limits, 1 MiB a text and 64 MiB in all; `size_of`, all that `data write` asks for, takes them."""
    long = b"x" * 2_000_000
    body = {
        "tEXt": b"prompt\0" + long,
        "zTXt": b"prompt\0\0" + zlib.compress(long),
        "iTXt": b"prompt\0\1\0\0\0" + zlib.compress(long),
        "iCCP": b"profile\0\0" + zlib.compress(long),
    }[name]
    plain = FORMATS["png alpha"]
    at = 33 if where == "before" else len(plain) - 12  # behind the header, or before the end
    data = plain[:at] + chunk(name.encode(), body) * (1 if name == "iCCP" else 40) + plain[at:]
    assert size_of(data) == size_of(plain)
    np.testing.assert_array_equal(decode(data), decode(plain))


def test_a_pointer_of_git_lfs_is_named():
    with pytest.raises(ValueError, match="it is a Git LFS pointer and not the picture: run `git lfs pull`"):
        size_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
