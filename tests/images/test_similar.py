"""Digests and the perceptual hash: the same after small changes of an image, far apart for other pages and charts."""

import itertools

import cv2
import documents
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import scipy.fft
from documents import CHANGES, KINDS, encoded, render

from fastvlm_jax.images.similar import BITS, NEAR, WORDS, distances, look_at, nearest, pixel_digest, stacked

LOOKS = {kind.__name__: [look_at(encoded(render(kind, number))) for number in range(8)] for kind in KINDS}


def near(a, b):
    return len(nearest(a, stacked([b]))[0]) == 1


@pytest.mark.parametrize("kind", LOOKS)
def test_different_pages_forms_tables_and_charts_of_one_layout_are_not_near(kind):
    assert [(i, j) for (i, a), (j, b) in itertools.combinations(enumerate(LOOKS[kind]), 2) if near(a, b)] == []


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "quarter size"])
def test_an_image_is_found_again_after_a_change(name):
    change, quality = CHANGES[name]
    for kind in (documents.page, documents.form, documents.table, documents.bars):
        moved = look_at(encoded(change(render(kind, 0)), "JPEG", quality=quality))
        assert near(moved, LOOKS[kind.__name__][0]), kind


def test_a_picture_that_fills_its_frame_is_a_photograph_and_may_lose_two_per_cent_of_its_border():
    photographs = [i for i, look in enumerate(LOOKS["discs"]) if look.photograph]
    assert len(photographs) >= 4
    for i in photographs:
        cut = look_at(encoded(documents.cut(render(documents.discs, i), 0.02)))
        assert near(cut, LOOKS["discs"][i])
        assert distances(cut.hash[None], LOOKS["discs"][i].hash[None])[0, 0] > NEAR // 4  # it did change
    assert not any(look.photograph for kind in LOOKS if kind != "discs" for look in LOOKS[kind])


def shape(color, left, background="white", size=(300, 200)):
    image = PIL.Image.new("RGB", size, background)
    draw = PIL.ImageDraw.Draw(image)
    draw.polygon([(left, 40), (left + 80, 60), (left + 50, 85), (left + 70, 120), (left + 20, 110)], color)
    return look_at(encoded(image))


def test_the_same_shape_in_another_place_or_colour_is_another_picture():
    red = shape("red", 20)
    assert near(red, shape("red", 20)) and near(red, shape((245, 0, 0), 20))
    others = {"place": shape("red", 180), "colour": shape("blue", 20), "ground": shape("red", 20, "#c0c0ff")}
    assert [name for name, look in others.items() if near(red, look)] == []
    assert distances(red.hash[None], others["place"].hash[None])[0, 0] <= NEAR  # by the hash alone they are the same


def test_the_box_is_what_lies_inside_the_plain_border_and_its_colour_a_mean():
    image = PIL.Image.new("RGB", (200, 100), "white")
    PIL.ImageDraw.Draw(image).rectangle((50, 20, 149, 59), "#0000ff")
    look = look_at(encoded(image))
    assert look.box.tolist() == pytest.approx([0.2, 0.59, 0.25, 0.745])
    assert look.color.tolist() == pytest.approx([-0.114 * 255, 255 - 0.114 * 255], abs=0.1)


def test_the_hash_is_the_sign_of_the_lowest_frequencies_against_their_median():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)
    low = scipy.fft.dctn(pixels.astype(np.float64), norm="ortho")[:24, :24].ravel()
    expected = low > np.median(low[1:])
    expected[0] = False
    look = look_at(encoded(PIL.Image.fromarray(pixels)))
    got = np.unpackbits(look.hash.view(np.uint8)).astype(bool)
    assert (got != expected).sum() <= 1 and len(got) == BITS  # the median itself may round either way
    assert look.photograph


def test_distances_count_the_bits_that_differ():
    a, b = (np.random.default_rng(i).integers(0, 2**64, (3 + i, WORDS), np.uint64) for i in (0, 1))
    whole = [[int.from_bytes(row.tobytes(), "little") for row in rows] for rows in (a, b)]
    assert distances(a, b).tolist() == [[(x ^ y).bit_count() for y in whole[1]] for x in whole[0]]
    assert distances(a, b[:0]).shape == (3, 0)


def test_pixels_are_the_same_however_they_are_stored():
    image = render(documents.bars, 0)
    png, bmp, webp = encoded(image), encoded(image, "BMP"), encoded(image, "WEBP", lossless=True)
    assert pixel_digest(png) == pixel_digest(bmp) == pixel_digest(webp)
    assert pixel_digest(png) != pixel_digest(encoded(image, "JPEG"))
    turned = PIL.Image.fromarray(np.zeros((2, 8, 3), np.uint8))
    assert pixel_digest(encoded(turned)) != pixel_digest(encoded(turned.resize((8, 2)).rotate(90, expand=True)))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5, 4), (4000, 2)])
def test_images_of_any_size_have_a_hash_and_those_of_one_colour_have_none(size):
    assert not look_at(encoded(PIL.Image.new("RGB", size, "white"))).hash.any()
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8)
    assert look_at(encoded(PIL.Image.fromarray(pixels))).hash.shape == (WORDS,)


def test_what_is_no_image_is_named():
    with pytest.raises(ValueError, match="format"):
        look_at(b"no image")
    assert cv2.__version__  # the hash rests on its DCT
