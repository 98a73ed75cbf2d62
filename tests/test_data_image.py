import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from fastvlm_jax.data.image import decode, pad_to_square

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a CUDA build beside a CPU torch lacks these two, which its import asks for
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


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


def llava_expand2square(image, background=(0, 0, 0)):
    """LLaVA's mm_utils.expand2square; the background is int(255 * image_mean)."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = PIL.Image.new(image.mode, (width, width), background)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = PIL.Image.new(image.mode, (height, height), background)
    result.paste(image, ((height - width) // 2, 0))
    return result


@pytest.mark.parametrize(
    "height, width", [(64, 64), (50, 81), (81, 50), (600, 371), (33, 700), (256, 256), (1, 300), (7, 2)]
)
@pytest.mark.parametrize("size, background", [(64, (0, 0, 0)), (128, (0, 0, 0)), (64, (122, 116, 104))])
def test_pixels_equal_clip_image_processor(height, width, size, background):
    image = photo(height, width)
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    )
    square = llava_expand2square(PIL.Image.fromarray(image), background)
    expected = theirs(square, return_tensors="np")["pixel_values"][0]
    ours = pad_to_square(image, size, background)
    assert ours.dtype == np.uint8 and ours.shape == (size, size, 3)
    np.testing.assert_array_equal(ours, np.rint(expected.transpose(1, 2, 0) * 255).astype(np.uint8))


def test_a_long_strip_is_never_held_as_a_square():
    assert pad_to_square(np.full((9, 30_000, 3), 255, np.uint8), 64).max() > 0  # the square: 2.7 GB


def test_jpeg_equals_pillow():
    data = encode(PIL.Image.fromarray(photo(120, 203)), format="JPEG", quality=85)
    np.testing.assert_array_equal(decode(data), np.asarray(PIL.Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg(mode, progressive):
    image = PIL.Image.fromarray(photo(40, 60)).convert(mode)
    data = encode(image, format="JPEG", quality=95, progressive=progressive)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert decode(data).shape == (40, 60, 3)
    assert abs(decode(data) - expected).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_are_exact(kind):
    image = photo(30, 41)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(PIL.Image.fromarray(image), format=kind, **options)), image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(kind):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # white on the left
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: left becomes top
    upright = decode(encode(PIL.Image.fromarray(image), format=kind, exif=exif))
    assert upright.shape == (32, 16, 3)
    assert upright[:14].min() > 250 and upright[18:].max() < 5


def test_transparency_is_shown_over_black():
    rgba = np.full((2, 2, 4), 200, np.uint8)
    rgba[..., 3] = [[0, 255], [51, 255]]
    expected = [[[0] * 3, [200] * 3], [[40] * 3, [200] * 3]]
    assert decode(encode(PIL.Image.fromarray(rgba), format="PNG")).tolist() == expected


def test_palette_and_grey_modes():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2).tolist()
    assert decode(encode(PIL.Image.fromarray(grey), format="PNG")).tolist() == rgb
    palette = PIL.Image.fromarray(grey).convert("P")
    assert decode(encode(palette, format="PNG")).tolist() == rgb
    clear = palette.getpixel((1, 1))
    rgb[1][1] = [0, 0, 0]
    assert decode(encode(palette, format="PNG", transparency=clear)).tolist() == rgb
    wide = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    assert decode(encode(wide, format="PNG"))[..., 0].tolist() == grey.tolist()


def test_animation_gives_its_first_frame():
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def png_header(width, height):
    """A PNG of a few bytes that claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"not an image at all", "not an image of a known format"),
        (b"\xff\xd8\xff\xe0 broken", "cannot be read"),
        (png_header(10_001, 10_000), "10001 x 10000 is more than 100,000,000 pixels"),
        (png_header(40_000, 1), "40000 x 1 is more than .* 32,768 along a side"),
        (png_header(60_000, 60_000), "cannot be read"),
        (png_header(100, 100), "cannot be read"),
        (encode(PIL.Image.fromarray(photo(64, 64)), format="PNG")[:900], "cannot be read"),
        (encode(PIL.Image.fromarray(photo(64, 64)), format="JPEG")[:900], "cannot be read"),
        (encode(PIL.Image.fromarray(photo(64, 64)), format="WEBP")[:300], "cannot be read"),
    ],
)
def test_bad_images_raise_one_line(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        decode(data)
    assert "\n" not in str(caught.value)
