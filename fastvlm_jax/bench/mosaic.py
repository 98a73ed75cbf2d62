"""Makes photos to time with: mosaics of cut-outs from real photos, 512 pixels wide, and encoded as JPEG.

So large images have as much detail per pixel as small ones.
"""

import importlib.util
import io
import pathlib
import random

import matplotlib.cbook
import PIL.Image

PIECE = 512, 384
QUALITY = 90  # of the JPEG
PHOTO = 2048, 1536  # width and height of the photo that `bench ttft` reads, pixels
# The pictures of scikit-image and scikit-learn that are photos.
NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg", "china.jpg", "flower.jpg",
)  # fmt: skip


def find_photos(folders: list[str]) -> list[PIL.Image.Image]:
    """Reads the photos in folders, by default those of the installed packages scikit-image and scikit-learn.

    Raises:
      FileNotFoundError: there is no photo; the message says how to get some.
    """
    if not folders:
        found = [importlib.util.find_spec(name) for name in ("skimage", "sklearn")]
        folders = [spec.submodule_search_locations[0] for spec in found if spec]
    paths = sorted(path for folder in folders for path in pathlib.Path(folder).rglob("*") if path.name in NAMES)
    if not paths:
        raise FileNotFoundError(
            "found no photos: run `pip install --target FOLDER scikit-image scikit-learn`, then pass --photos FOLDER"
        )
    photos = [PIL.Image.open(path).convert("RGB") for path in paths]
    return [grown(photo) for photo in photos]


def grown(photo: PIL.Image.Image) -> PIL.Image.Image:
    """Returns the photo, enlarged if a cut-out would not fit into it."""
    scale = max(1.0, PIECE[0] / photo.width, PIECE[1] / photo.height)
    return photo.resize((round(photo.width * scale), round(photo.height * scale)), PIL.Image.Resampling.BICUBIC)


def mosaic(photos: list[PIL.Image.Image], size: tuple[int, int], draw: random.Random) -> PIL.Image.Image:
    """Returns an image of `size` (width, height), composed of random cut-outs."""
    image = PIL.Image.new("RGB", size)
    for top in range(0, size[1], PIECE[1]):
        for left in range(0, size[0], PIECE[0]):
            photo = draw.choice(photos)
            x, y = draw.randint(0, photo.width - PIECE[0]), draw.randint(0, photo.height - PIECE[1])
            image.paste(photo.crop((x, y, x + PIECE[0], y + PIECE[1])), (left, top))
    return image


def sample_jpeg(size: tuple[int, int]) -> bytes:
    """Returns an encoded photo of `size` (width, height), the same everywhere: cut-outs of the photo in matplotlib."""
    photo = PIL.Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    buffer = io.BytesIO()
    mosaic([grown(photo)], size, random.Random(0)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
