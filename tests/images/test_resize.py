import io
import math
import time

import numpy as np
import PIL.Image
import pytest
import torch_reference  # noqa: F401 (makes torchvision importable)
from pictures import encode, photo
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastvlm_jax.images.decode import views_into
from fastvlm_jax.images.resize import fit_into, tiles_into

BICUBIC = PIL.Image.Resampling.BICUBIC
SIZES = [(64, 64), (50, 81), (81, 50), (600, 371), (33, 700), (256, 256), (1, 300), (7, 2), (1, 1)]


def fit(image, height, width, *options, **more):
    out = np.full((height, width, 3), 77, np.uint8)
    fit_into(image, out, *options, **more)
    return out


def on_square(image, background):
    """Returns the image in the middle of a square, like LLaVA's expand2square."""
    width, height = image.size
    square = PIL.Image.new("RGB", (max(image.size),) * 2, background)
    square.paste(image, ((max(image.size) - width) // 2, (max(image.size) - height) // 2))
    return square


def clip_processor(image, height, width):
    side = {"shortest_edge": max(height, width)} if height == width else {"height": height, "width": width}
    theirs = CLIPImageProcessorPil(
        size=side,
        crop_size={"height": height, "width": width},
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    )
    pixels = theirs(image, return_tensors="np")["pixel_values"][0]
    return np.rint(pixels.transpose(1, 2, 0) * 255).astype(np.uint8)


def smooth(height, width):
    """Returns a picture without detail finer than 40 pixels, on which all good resizing methods agree."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 23) + np.cos(y / 31), np.cos(x / 29 + y / 37), np.sin(y / 19) * np.cos(x / 41)]
    return (128 + 60 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


def psnr(one, two):
    return 10 * math.log10(255**2 / max(((one.astype(float) - two) ** 2).mean(), 1e-9))


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("size, background", [(64, (0, 0, 0)), (128, (122, 116, 104))])
def test_exact_pad_equals_clip_image_processor(height, width, size, background):
    image = photo(height, width)
    expected = clip_processor(on_square(PIL.Image.fromarray(image), background), size, size)
    np.testing.assert_array_equal(fit(image, size, size, "pad", background, exact=True), expected)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("size", [64, 101])
def test_exact_crop_equals_clip_image_processor(height, width, size):
    image = photo(height, width)
    ours = fit(image, size, size, "crop", exact=True).astype(int)
    expected = clip_processor(PIL.Image.fromarray(image), size, size)
    # Beyond 8 to 1 the part that is cut off is not resized: single pixels may differ by one.
    tolerance = 1 if max(height, width) > 8 * min(height, width) else 0
    assert abs(ours - expected).max() <= tolerance and (ours != expected).mean() < 0.01


@pytest.mark.parametrize("height, width", SIZES)
def test_exact_stretch_equals_pillow(height, width):
    image = photo(height, width)
    expected = PIL.Image.fromarray(image).resize((48, 64), BICUBIC)
    np.testing.assert_array_equal(fit(image, 64, 48, "stretch", exact=True), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_pad_is_the_image_between_borders(exact):
    image = np.full((30, 60, 3), 200, np.uint8)
    for height, width, inside in [
        (60, 60, np.s_[15:45, :]),
        (40, 60, np.s_[5:35, :]),
        (30, 80, np.s_[:, 10:70]),
        (30, 60, np.s_[:, :]),
    ]:
        out = fit(image, height, width, "pad", (1, 2, 3), exact)
        expected = np.full((height, width, 3), (1, 2, 3), np.uint8)
        expected[inside] = 200
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("exact", [False, True])
def test_an_image_of_the_wanted_size_is_copied(exact):
    image = photo(48, 64)
    for mode in ("pad", "crop", "stretch"):
        np.testing.assert_array_equal(fit(image, 48, 64, mode, (9, 9, 9), exact), image)
    padded = fit(photo(37, 64), 64, 64, "pad", (9, 9, 9), exact)  # where expand2square places it
    np.testing.assert_array_equal(padded[13:50], photo(37, 64))


@pytest.mark.parametrize("exact", [False, True])
def test_crop_shows_the_centre(exact):
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 255
    # Pillow mixes pixels beyond the edge of the crop into the first ones.
    assert fit(image, 40, 40, "crop", exact=exact)[:, 4:-4].min() > 250
    assert fit(image.swapaxes(0, 1), 40, 40, "crop", exact=exact)[4:-4].min() > 250
    wide = fit(image, 40, 80, "crop", exact=exact)  # 10 to 50 of the 60 columns
    assert wide[:, 24:56].min() > 250 and wide[:, :16].max() < 5 and wide[:, 64:].max() < 5


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("height, width", [(480, 640), (600, 400), (333, 500), (1200, 1600), (301, 199), (700, 100)])
@pytest.mark.parametrize("box", [(256, 256), (192, 320), (512, 512)])
def test_fast_pixels_are_close_to_exact_ones_and_not_shifted(mode, height, width, box):
    image = smooth(height, width)
    fast = fit(image, *box, mode)
    exact = fit(image, *box, mode, exact=True)
    inside = np.s_[:]
    if mode == "pad":  # the border's edge may be off by a pixel
        scale = min(box[0] / height, box[1] / width)
        top, left = (int((whole - part * scale) / 2) for whole, part in zip(box, (height, width), strict=True))
        inside = np.s_[top + 2 : box[0] - top - 2, left + 2 : box[1] - left - 2]
    assert psnr(fast[inside], exact[inside]) > 37
    assert abs(fast[inside].mean((0, 1)) - exact[inside].mean((0, 1))).max() < 1.5
    # Edges are at whole pixels; CLIP's crop is off centre by half a pixel if the rest is odd.
    shift = 0.05 if mode == "stretch" else 0.55
    for axis in (0, 1):
        slope = np.gradient(exact[inside].astype(float), axis=axis)
        difference = fast[inside].astype(float) - exact[inside]
        assert abs((slope * difference).sum() / (slope**2).sum()) < shift


def test_noise_is_averaged_where_an_image_shrinks():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)  # standard deviation 74
    assert fit(noise, 100, 100).std() < 20  # 18.5 for means of 16 pixels
    for side in (130, 170, 210, 300):  # nearly as much as is left by Pillow's bicubic
        assert fit(noise, side, side).std() < 1.1 * fit(noise, side, side, exact=True).std()
    assert fit(noise[:, :60], 100, 100, "stretch").std() < 45  # fewer rows, more columns


@pytest.mark.parametrize("mode", ["crop", "stretch"])  # not pad: LLaVA puts the odd pixel on one side
def test_a_symmetric_image_stays_symmetric(mode):
    for height, width in ((100, 150), (150, 101), (31, 47), (300, 202)):
        image = photo(height, width)
        image = np.maximum(image, image[::-1])
        image = np.maximum(image, image[:, ::-1])
        out = fit(image, 64, 64, mode).astype(int)
        assert abs(out - out[::-1]).mean() < 1 and abs(out - out[:, ::-1]).mean() < 1


def test_every_pixel_of_a_view_is_written_and_none_around():
    for mode in ("pad", "crop", "stretch"):
        for exact in (False, True):
            for height, width in ((20, 60), (60, 20), (40, 40), (1, 300)):
                batch = np.stack([np.full((3, 40, 40, 3), value, np.uint8) for value in (77, 13)])
                for before in batch:
                    fit_into(photo(height, width), before[1], mode, (5, 5, 5), exact)
                np.testing.assert_array_equal(batch[0, 1], batch[1, 1])
                assert (batch[0, [0, 2]] == 77).all() and (batch[1, [0, 2]] == 13).all()


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="unknown mode 'squash' to fit images: choose pad, crop or stretch"):
        fit(photo(8, 8), 8, 8, "squash")


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("exact", [False, True])
def test_long_strips_take_little_time_and_memory(mode, exact):
    for height, width in ((9, 30_000), (8_000, 9), (1, 20_000)):
        start = time.perf_counter()
        out = fit(np.full((height, width, 3), 255, np.uint8), 64, 64, mode, exact=exact)  # padded: 2.7 GB
        assert (out.max() > 0 or height == 1) and time.perf_counter() - start < 5


def llava_anyres(image, size, rows, columns):
    """Computes LLaVA's process_anyres_image step by step: float scale, rounded up, centred on black, cut."""
    box_width, box_height = columns * size, rows * size
    width, height = image.size
    if box_width / width < box_height / height:
        new = box_width, min(math.ceil(height * (box_width / width)), box_height)
    else:
        new = min(math.ceil(width * (box_height / height)), box_width), box_height
    canvas = PIL.Image.new("RGB", (box_width, box_height))
    canvas.paste(image.resize(new), ((box_width - new[0]) // 2, (box_height - new[1]) // 2))
    cuts = [(x, y, x + size, y + size) for y in range(0, box_height, size) for x in range(0, box_width, size)]
    return np.stack([image.resize((size, size)), *(canvas.crop(cut) for cut in cuts)])


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 3), (3, 1)])
def test_exact_views_equal_llavas(height, width, grid):
    image = PIL.Image.fromarray(photo(height, width))
    out = np.full((1 + grid[0] * grid[1], 32, 32, 3), 77, np.uint8)
    clip_mean = (122, 116, 104)  # around a padded overview; tiles are on black for every encoder
    views_into(encode(image, format="PNG"), out, grid, "stretch", clip_mean, exact=True)
    np.testing.assert_array_equal(out, llava_anyres(image, 32, *grid))


def test_tiles_are_in_reading_order():
    image = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), 8, 0), 8, 1) * np.ones(3, np.uint8)
    for exact in (False, True):
        out = np.empty((6, 8, 8, 3), np.uint8)
        tiles_into(image, out, (2, 3), exact=exact)
        assert [np.unique(tile).tolist() for tile in out] == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("grid", [(0, 0), (2, 2), (1, 2)])
@pytest.mark.parametrize("height, width", [(1500, 2000), (1000, 300), (90, 120)])
def test_fast_views_of_a_jpeg_are_close_to_exact_ones(mode, grid, height, width):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encode(PIL.Image.fromarray(smooth(height, width)), format="JPEG", quality=97, exif=exif)
    views = np.empty((2, 1 + grid[0] * grid[1], 128, 128, 3), np.uint8)
    for exact in (0, 1):
        views[exact] = 77
        views_into(data, views[exact], grid, mode, (60, 60, 60), bool(exact))
    border = 2 if mode == "pad" else 0
    assert np.median(abs(views[0].astype(int) - views[1])) <= 2
    for fast, exact in zip(*views, strict=True):
        assert abs(fast.mean((0, 1)) - exact.mean((0, 1))).max() < 2.5 + border


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("grid", [(0, 0), (2, 2)])
@pytest.mark.parametrize("height, width", [(512, 1024), (1024, 512), (600, 600)])
def test_fast_views_of_a_jpeg_lose_no_detail(mode, grid, height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    data = encode(PIL.Image.fromarray(noise), format="JPEG", quality=97)
    views = np.empty((2, 1 + grid[0] * grid[1], 128, 128, 3), np.uint8)
    for exact in (0, 1):
        views_into(data, views[exact], grid, mode, exact=bool(exact))
    fast, exact = abs(np.diff(views.astype(int), axis=3)).mean((2, 3, 4))
    assert (fast > 0.8 * exact).all()  # 0.3 to 0.4 if the JPEG is decoded at half the size


def test_a_wrong_number_of_views_is_named():
    data = encode(PIL.Image.fromarray(photo(8, 8)), format="PNG")
    with pytest.raises(ValueError, match=r"a grid of 2 x 2 needs 5 views, but out is \[4, 8, 8, 3\]"):
        views_into(data, np.empty((4, 8, 8, 3), np.uint8), (2, 2))


def test_exact_views_equal_clip_image_processor_on_a_jpeg():
    image = PIL.Image.fromarray(photo(90, 130))
    data = encode(image, format="JPEG", quality=80)
    out = np.empty((1, 64, 64, 3), np.uint8)
    views_into(data, out, background=(122, 116, 104), exact=True)
    decoded = PIL.Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(out[0], clip_processor(on_square(decoded, (122, 116, 104)), 64, 64))
