"""Every Pillow mode in every format: the pixels of transformers' image processors, live, or a known exception."""

import contextlib
import io
import struct

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg
import torch_reference  # noqa: F401 (makes torchvision importable)
from pictures import encode, exif, photo, png
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fastvlm_jax.images.decode import decode, shrink, size_of, views_into
from fastvlm_jax.images.inputs import to_pixels
from fastvlm_jax.images.modes import to_array, to_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIDE = 64
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", *(("AVIF",) if PIL.features.check("avif") else ()))
MODES = (
    *("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "F", "I;16", "I;16B", "I;16L"),
)
# CLIPImageProcessor clips these pixels to 0 to 255: nearly all become white.
SIXTEEN_BITS = {("I;16", "PNG"), ("I;16B", "PNG"), *((mode, "TIFF") for mode in ("I", "I;16", "I;16B", "I;16L"))}
REFUSED = {("F", "TIFF")}


def transparent(height=90, width=130):
    """A photo whose opacity falls from 255 on the left to 0 on the right, in steps; an RGBA image."""
    alpha = np.linspace(300, -60, width).clip(0, 255) // 17 * 17
    rows = np.broadcast_to(alpha[:, None], (height, width, 1)).astype(np.uint8)
    return PIL.Image.fromarray(np.concatenate([photo(height, width), rows], 2))


def picture(mode):
    """The photo in a mode, transparent where the mode allows it."""
    rgba = transparent()
    grey = np.asarray(rgba.convert("L"))
    if mode.startswith("I"):
        kind = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
        return PIL.Image.frombytes(mode, rgba.size, (grey.astype(int) * 257).astype(kind).tobytes())
    if mode in ("P", "PA"):
        return rgba.convert("RGB").quantize(16).convert(mode)
    if mode == "LAB":
        return PIL.Image.frombytes("LAB", rgba.size, rgba.convert("RGB").tobytes())
    return rgba.convert("LA").convert("La") if mode == "La" else rgba.convert(mode)


def files():
    """Returns the pictures that Pillow can save: {(mode, format): bytes}."""
    found = {}
    for mode in MODES:
        for kind in FORMATS:
            with contextlib.suppress(OSError, ValueError):  # the format cannot hold the mode
                found[mode, kind] = encode(picture(mode), format=kind)
    key = dict(transparency=3)
    found["P with a transparent entry", "PNG"] = encode(picture("P"), format="PNG", **key)
    found["P with opacities", "PNG"] = encode(picture("P"), format="PNG", transparency=bytes(range(0, 240, 15)))
    found["P with a transparent entry", "GIF"] = encode(picture("P"), format="GIF", **key)
    found["L with a transparent level", "PNG"] = encode(
        picture("L"), format="PNG", transparency=picture("L").getpixel((0, 0))
    )
    found["1 with a transparent level", "PNG"] = encode(picture("1"), format="PNG", transparency=0)
    clear = picture("RGB").getpixel((3, 3))
    found["RGB with a transparent colour", "PNG"] = encode(picture("RGB"), format="PNG", transparency=clear)
    cmyk = found["CMYK", "JPEG"]
    adobe = cmyk.index(b"\xff\xee")
    found["CMYK without Adobe's mark", "JPEG"] = cmyk[:adobe] + cmyk[adobe + 16 :]
    inverted = np.ascontiguousarray(255 - np.asarray(picture("CMYK")))
    found["YCCK", "JPEG"] = simplejpeg.encode_jpeg(inverted, 90, "CMYK", "420")
    found["RGB stored as RGB", "JPEG"] = encode(picture("RGB"), format="JPEG", keep_rgb=True)
    pages = dict(save_all=True, append_images=[PIL.Image.new("RGBA", (130, 90), "red")])
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        found["RGBA, two frames", kind] = encode(transparent(), format=kind, **pages)
    sixteen = np.asarray(transparent()).astype(np.uint16) * 257
    found["RGBA of 16 bits", "PNG"] = png(sixteen, 16, 6)
    found["LA of 16 bits", "PNG"] = png(sixteen[..., 2:], 16, 4)
    return found


FILES = files()


def view(data, mode="crop", background=(0, 0, 0), exact=True, transparency="white"):
    out = np.full((1, SIDE, SIDE, 3), 77, np.uint8)
    views_into(data, out, mode=mode, background=background, exact=exact, transparency=transparency)
    return out[0]


def reference(image, kind=CLIPImageProcessorPil, mean=(0.0, 0.0, 0.0), **options):
    """Returns the pixels of transformers' processor, with the settings of FastVLM's: mean 0, std 1, bicubic."""
    sides = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    theirs = kind(**sides, image_mean=list(mean), image_std=[1.0, 1.0, 1.0], do_convert_rgb=True, **options)
    pixels = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0) + np.array(mean)
    return np.rint(pixels * 255).astype(np.uint8)


def opened(data):
    return PIL.Image.open(io.BytesIO(data))


def test_the_table_is_whole():
    assert len(FILES) >= 70 and {kind for _, kind in FILES} == set(FORMATS)
    assert FILES.keys() >= SIXTEEN_BITS | REFUSED


@pytest.mark.parametrize("mode, kind", sorted(FILES))
def test_exact_pixels_are_those_of_transformers_or_the_exception_is_listed(mode, kind):
    data = FILES[mode, kind]
    if (mode, kind) in REFUSED:
        with pytest.raises(ValueError, match="its pixels are floating-point numbers"):
            view(data)
        return
    clip, llava = (
        reference(opened(data)),
        reference(opened(data), LlavaImageProcessorPil, (0.5, 0.4, 0.25), do_pad=True),
    )
    if (mode, kind) in SIXTEEN_BITS:
        assert clip.mean() > 250 and view(data).mean() < 200
        np.testing.assert_array_equal(view(data), reference(picture("L")))  # as if saved with 8 bits
        return
    np.testing.assert_array_equal(view(data), clip)
    np.testing.assert_array_equal(view(data, "pad", (127, 102, 63)), llava)


@pytest.mark.parametrize("mode, kind", sorted(FILES.keys() - SIXTEEN_BITS - REFUSED))
def test_dropped_transparency_gives_the_pixels_of_llava(mode, kind):
    """LLaVA and ml-fastvlm open an image with convert("RGB"), and their processor does not compose."""
    colours = np.asarray(
        opened(FILES[mode, kind]).convert("RGB")
    )  # an array, as `info` still names a transparent colour
    expected = reference(PIL.Image.fromarray(colours))
    np.testing.assert_array_equal(view(FILES[mode, kind], transparency="drop"), expected)


@pytest.mark.parametrize("mode, kind", sorted(FILES.keys() - REFUSED))
def test_fast_pixels_stay_near_exact_ones(mode, kind):
    for fit in ("pad", "crop"):
        fast, exact = (view(FILES[mode, kind], fit, exact=exact).astype(int) for exact in (False, True))
        # Levels of 255. A picture of black and white dots, noise at half the size, is the worst that there is.
        assert abs(fast - exact).mean() < (13 if mode == "1" else 3)
        assert abs(fast.mean((0, 1)) - exact.mean((0, 1))).max() < 1.5  # the border of `pad` is off by half a pixel


def test_orientation_is_the_other_exception():
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(picture("RGB"), format=kind, exif=exif(6))
        np.testing.assert_array_equal(view(data), reference(PIL.ImageOps.exif_transpose(opened(data))))
        assert (view(data) != reference(opened(data))).any()


def test_dark_text_on_a_transparent_ground_can_be_read():
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 20:40, 3] = 255  # a black letter on transparent black
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("GIF", {})):
        image = decode(encode(PIL.Image.fromarray(pixels), format=kind, **options))
        assert image[10:30, 20:40].max() < 10 and image[:8].min() > 245
    assert not decode(encode(PIL.Image.fromarray(pixels), format="PNG"), transparency="drop").any()


def test_a_transparent_level_of_16_bits_is_white():
    grey = np.array([[[0x1234], [0x1235], [0xFF00]]])
    data = png(grey, 16, 0, chunks=[(b"tRNS", struct.pack(">H", 0x1234))])
    assert decode(data)[0, :, 0].tolist() == [255, 0x12, 0xFF]
    assert decode(data, transparency="drop")[0, :, 0].tolist() == [0x12, 0x12, 0xFF]


@pytest.mark.parametrize(
    "bits, white, pixels, expected",
    [
        (12, 1, bytes([0xFF, 0xF8, 0x00, 0x40, 0x00, 0x00]), [255, 128, 64, 0]),  # levels 0xFFF, 0x800, 0x400, 0
        (16, 1, struct.pack("<4H", 0xFFFF, 0x8000, 0x00FF, 0), [255, 128, 0, 0]),
        (16, 0, struct.pack("<4H", 0xFFFF, 0x8000, 0x00FF, 0), [0, 127, 255, 255]),  # as X-ray films: 0 is white
    ],
)
def test_deep_grey_of_a_tiff_keeps_its_brightness(bits, white, pixels, expected):
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: white, 273: 8 + 2 + 8 * 12 + 4, 278: 1, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels
    assert decode(data)[0, :, 0].tolist() == expected
    assert to_pixels(opened(data))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV"])
def test_modes_that_only_programs_make_become_rgb(mode):
    image = picture(mode)
    if mode in ("La", "RGBa"):  # premultiplied: what is added is the part of white that shows through
        values = np.asarray(image).astype(int)
        expected = values[..., [0, 0, 0] if mode == "La" else [0, 1, 2]] + 255 - values[..., -1:]
    else:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(to_rgb(to_array(image)) - expected).max() <= 1


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_shrinking_keeps_what_is_seen_and_what_is_behind(kind, options):
    data = encode(transparent(180, 260), format=kind, **options)
    small = shrink(data, 130)
    assert opened(small).mode == "RGBA" and size_of(small) == (130, 90)
    for transparency in ("white", "drop"):
        full = PIL.Image.fromarray(decode(data, transparency=transparency))
        expected = np.asarray(full.resize((130, 90), PIL.Image.Resampling.BICUBIC)).astype(int)
        difference = abs(decode(small, transparency=transparency) - expected)
        # Behind pixels that are nearly transparent, 8 bits hold little of a colour.
        assert difference.max() <= 3 if transparency == "white" else difference.mean() < 2


def test_shrinking_mixes_no_hidden_colour_into_an_edge():
    pixels = np.zeros((90, 90, 4), np.uint8)
    pixels[20:55, 31:66] = 255  # a white square on transparent black: white everywhere
    small = shrink(encode(PIL.Image.fromarray(pixels), format="PNG"), 40)
    assert decode(small).min() >= 254
    assert decode(small, transparency="drop")[[0, -1]].max() == 0
