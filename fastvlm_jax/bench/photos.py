"""Makes a data set for timing the input: JPEGs of 2048x1536, 1024x768 and 640x480 in equal parts, with conversations.

    python -m fastvlm_jax.bench.photos --output DIR [--count 1000] [--photos FOLDER ...]

Each image is a mosaic of cut-outs from real photos, 512 pixels wide, so that large images have as much detail per pixel
as small ones. The photos come with scikit-image and scikit-learn, wherever they are installed. To keep these packages
out of this environment, use `pip install --target FOLDER scikit-image scikit-learn` and pass --photos FOLDER. The
conversations are as long as LLaVA's. DIR gets photos/, train.json (in LLaVA's format) and shards/.
"""

import importlib.util
import json
import pathlib
import random
import re

import PIL.Image
from absl import app, flags

from fastvlm_jax.data import write
from fastvlm_jax.data.readers import Options

OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
COUNT = flags.DEFINE_integer("count", 1000, "number of images", lower_bound=1)
PHOTOS = flags.DEFINE_multi_string(
    "photos", [], "folder to search for photos, once per folder; by default the installed packages"
)
DIVIDE = flags.DEFINE_integer("divide", 1, "divisor of the image sides, for quick trials", lower_bound=1)

SIZES = ((2048, 1536), (1024, 768), (640, 480))
PIECE = 512, 384
QUALITY = 90
# The packages' pictures that are photos.
NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "motorcycle_right.png", "retina.jpg", "rocket.jpg", "china.jpg", "flower.jpg",
)  # fmt: skip
WORDS = re.findall(
    r"\w+",
    "the a of in on with to and is are two several small large red blue green white wooden person man woman child dog "
    "cat street table window building tree sky water bicycle car bench cup plate umbrella standing sitting holding "
    "looking walking near behind beside under background foreground appears suggests likely scene image shows left "
    "right side various colorful bright",
)


def find_photos(folders: list[str]) -> list[PIL.Image.Image]:
    """Reads the photos in folders, by default those of the installed packages.

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


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """Returns turns in LLaVA's format: one to eight questions, with short and long answers."""
    turns = []
    for i in range(draw.choice((1, 1, 3, 5, 8))):
        question = " ".join(draw.choices(WORDS, k=draw.randint(5, 12))).capitalize() + "?"
        answer = " ".join(draw.choices(WORDS, k=draw.choice((1, 2, 8, 20, 80)))).capitalize() + "."
        turns.append({"from": "human", "value": "<image>\n" + question if i == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def main(_):
    folder, draw = pathlib.Path(OUTPUT.value), random.Random(0)
    photos = find_photos(PHOTOS.value)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(COUNT.value):
        width, height = (side // DIVIDE.value for side in SIZES[i % len(SIZES)])
        name = f"{i:06d}.jpg"
        mosaic(photos, (width, height), draw).save(folder / "photos" / name, quality=QUALITY)
        entries.append({"id": f"{i:06d}", "image": name, "conversations": conversation(draw)})
    (folder / "train.json").write_text(json.dumps(entries))
    options = Options(images=str(folder / "photos"))
    summary = write.write(folder / "train.json", folder / "shards", format="llava", options=options)
    print(summary.describe(str(folder / "shards")))


if __name__ == "__main__":
    app.run(main)
