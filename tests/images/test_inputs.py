"""What a notebook holds as an image, against the pixels that Pillow gives; and which prompt each image is for."""

import base64
import io
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from pictures import FORMATS, PHOTO, encode, exif, photo

from fastvlm_jax.images.decode import decode
from fastvlm_jax.images.inputs import MissingImage, share_images, to_pixels

RGB = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))
PNG = encode(PHOTO, format="PNG")


def written(data):
    """A file that was just written, which stands at its end."""
    file = io.BytesIO()
    file.write(data)
    return file


@pytest.mark.parametrize(
    "image",
    [
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        io.BytesIO(PNG),
        written(PNG),
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        PHOTO,
        PIL.Image.open(io.BytesIO(PNG)),
        RGB,
        RGB.astype(np.float64) / 255,
        (RGB / 255).astype(np.float32),
        np.asfortranarray(RGB),
        RGB[:, ::-1][:, ::-1],
        np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)]),
    ],
    ids=lambda image: f"{type(image).__name__} {getattr(image, 'dtype', '')}",
)
def test_every_form_is_the_same_picture(image):
    pixels = to_pixels(image)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, RGB)


def test_a_path_is_text_or_an_object_and_a_file_may_be_open(tmp_path, monkeypatch):
    path = tmp_path / "a b.png"
    path.write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    with path.open("rb") as file:
        for image in (str(path), path, "~/a b.png", pathlib.PurePosixPath(path), file):
            np.testing.assert_array_equal(to_pixels(image), RGB)


@pytest.mark.parametrize(
    "array, expected",
    [
        (GREY, PHOTO.convert("L").convert("RGB")),
        (GREY[..., None], PHOTO.convert("L").convert("RGB")),
        (GREY > 127, PIL.Image.fromarray(GREY > 127).convert("RGB")),
        (np.array([[0.0, 0.5], [0.25, 1.0]]), PIL.Image.fromarray(np.array([[0, 128], [64, 255]], np.uint8))),
        (np.ones((1, 1, 3), np.float16), PIL.Image.new("RGB", (1, 1), "white")),
    ],
)
def test_grey_bool_and_float_arrays(array, expected):
    np.testing.assert_array_equal(to_pixels(array), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("name", FORMATS)
def test_a_pillow_image_is_what_its_file_is(name):
    """Rotation by EXIF, transparency and depth are treated alike; JPEGs have two decoders of one library."""
    found = to_pixels(PIL.Image.open(io.BytesIO(FORMATS[name])))
    np.testing.assert_allclose(
        found.astype(int), decode(FORMATS[name]).astype(int), atol=0 if "jpeg" not in name else 3
    )


def test_transparency_of_an_array_is_that_of_a_file():
    alpha = np.dstack([photo(8, 9), np.arange(72, dtype=np.uint8).reshape(8, 9) * 3])
    data = encode(PIL.Image.fromarray(alpha), format="PNG")
    np.testing.assert_array_equal(to_pixels(alpha), to_pixels(data))
    np.testing.assert_array_equal(to_pixels(PIL.Image.fromarray(alpha)), to_pixels(data))


def test_a_pillow_image_stays_as_it_was():
    image = PIL.Image.open(io.BytesIO(encode(PHOTO, format="JPEG", exif=exif(6))))
    to_pixels(image)
    assert image.size == PHOTO.size and image.getexif()[0x0112] == 6
    np.testing.assert_array_equal(to_pixels(image), np.asarray(PIL.ImageOps.exif_transpose(image)))


@pytest.mark.parametrize(
    "image, words",
    [
        (None, r"picture is None, not a path, bytes, a file opened as 'rb', a Pillow image or an array"),
        (7, "picture is of type int, not a path"),
        ({"bytes": PNG}, "picture is of type dict"),
        (b"", r"picture: the image is empty \(0 bytes\)"),
        (PNG[:200], "picture: the image cannot be read: "),
        (io.StringIO("text"), "picture: the file gives str, not bytes: open it as 'rb'"),
        ("", "picture: there is no image with an empty name"),
        ("a\nb.png", r"picture: there is no image a\\nb.png"),
        ("\0.png", "picture: "),
        ("\ud800.png", "picture: "),
        ("x" * 5000, "picture: x{300}... cannot be opened: File name too long"),
        ("~nobody-of-that-name/a.png", "cannot be opened: Could not determine home directory"),
        ("https://example.com/a.png", "is an address of the web: download the image"),
        ("data:image/png,abc", "must begin with data:image/TYPE;base64,"),
        ("data:image/png;base64,ab?", "the base64 text of a data URL is damaged"),
        (np.full((2, 2, 3), 2.5), r"an array of float64 must be in \[0, 1\], not from 2.5 to 2.5"),
        (np.full((2, 2), np.nan), r"must be in \[0, 1\], not from nan to nan"),
        (np.array([[-0.1, 1.0]], np.float32), r"not from -0.1 to 1"),
        (RGB.astype(np.int64), r"must be uint8, bool, or floats in \[0, 1\], not int64 \[40, 60, 3\]"),
        (RGB.astype(np.uint16), "not uint16"),
        (RGB.transpose(2, 0, 1), r"not uint8 \[3, 40, 60\]: move the channels to the last axis"),
        (RGB[..., :2], r"an array must be \[H, W\], \[H, W, 1\], \[H, W, 3\] or \[H, W, 4\], not uint8 \[40, 60, 2\]"),
        (RGB[:0], r"not uint8 \[0, 60, 3\]$"),
        (np.array("red"), "an array must be"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "20000 x 20000 pixels: an image must have"),
        (np.broadcast_to(np.uint8(0), (1, 40_000)), "at most 32,768 along a side"),
        (PIL.Image.new("RGB", (0, 5)), "0 x 5 pixels: an image must have at least 1 x 1"),
        (PIL.Image.new("F", (5, 5)), "its pixels are floating-point numbers"),
        (PIL.Image.open(io.BytesIO(PNG[:-200])), "picture: the image cannot be read: "),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else type(value).__name__,
)
def test_any_other_form_is_refused_in_one_line(image, words):
    with pytest.raises(ValueError, match=words) as caught:
        to_pixels(image, "picture")
    assert "\n" not in str(caught.value) and "picture" in str(caught.value)


def test_a_folder_and_a_missing_file_are_no_images(tmp_path):
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(MissingImage, match=f"images\\[2\\]: there is no image {path}"):
            to_pixels(path, "images[2]")
    assert issubclass(MissingImage, FileNotFoundError) and issubclass(MissingImage, ValueError)


@pytest.mark.parametrize(
    "images, image_of, prompts, expected",
    [
        (None, None, 2, [(), ()]),
        ([], None, 1, [()]),
        ([], None, 0, []),
        (b"a", None, 0, []),
        (b"a", None, 2, [(0,), (0,)]),
        ([b"a"], None, 2, [(0,), (0,)]),
        ((b"a", b"b"), None, 2, [(0,), (1,)]),
        ([b"a", b"b", b"c"], None, 1, [(0, 1, 2)]),
        (np.zeros((2, 5, 5, 3), np.uint8), None, 2, [(0,), (1,)]),
        ([b"a", b"b"], [1, 0, 1], 3, [(1,), (0,), (1,)]),
        ([b"a", b"b"], [1, (0, 1), []], 3, [(1,), (0, 1), ()]),
        ([b"a", b"b"], np.array([1, 1]), 2, [(1,), (1,)]),
        ([[b"a"], [b"b", b"c"]], None, 2, [(0,), (1, 2)]),
        ([b"a", [b"b", b"c"], None, ()], None, 4, [(0,), (1, 2), (), ()]),
        ([None, b"a"], None, 2, [(), (0,)]),
        ([[b"a", b"b"]], None, 1, [(0, 1)]),
    ],
)
def test_which_images_each_prompt_is_about(images, image_of, prompts, expected):
    given, numbers = share_images(images, image_of, [()] * prompts)
    assert numbers == expected and all(i < len(given) for row in expected for i in row)


def test_images_are_named_as_the_caller_wrote_them():
    given, _ = share_images([b"a", [b"b", b"c"], None], None, [()] * 3)
    assert given == [("images[0]", b"a"), ("images[1][0]", b"b"), ("images[1][1]", b"c")]
    assert share_images(b"a", None, [()])[0] == [("images[0]", b"a")]


def test_images_in_the_messages_take_the_place_of_images():
    assert share_images(None, None, [(b"a", b"b"), (), (b"c",)])[1] == [(0, 1), (), (2,)]
    for images, image_of in ((b"x", None), ([], [0])):
        with pytest.raises(ValueError, match="the messages of the prompts hold images themselves"):
            share_images(images, image_of, [(b"a",)])


@pytest.mark.parametrize(
    "images, image_of, prompts, words",
    [
        ([b"a", b"b"], None, 3, "2 images for 3 texts: set image_of to the image of each text"),
        ([[b"a"], [b"b"]], None, 3, "images has the images of 2 prompts for 3 prompts"),
        ([[b"a"]], [0], 1, "leave image_of out"),
        (7, None, 1, "images is of type int"),
        ({b"a"}, None, 1, "images is of type set"),
        ((b for b in [b"a"]), None, 1, "images is of type generator"),
        ([b"a"], [1], 1, "image_of must give each of 1 texts one of 1 images"),
        ([b"a"], [-1], 1, "image_of must give"),
        ([b"a"], [0.0], 1, "image_of must give"),
        ([b"a"], 0, 1, "image_of must give"),
        ([b"a"], ["0"], 1, "image_of must give"),
        ([b"a"], [0, 0], 1, "image_of must give"),
        ([b"a"], [[[0]]], 1, "image_of must give"),
    ],
)
def test_what_does_not_match_is_refused(images, image_of, prompts, words):
    with pytest.raises(ValueError, match=words) as caught:
        share_images(images, image_of, [()] * prompts)
    assert "\n" not in str(caught.value)
