"""Makes a data set for timing the input: JPEGs of 2048x1536, 1024x768 and 640x480 in equal parts, with conversations.

    python -m fastvlm_jax.bench.photos --output DIR [--count 1000] [--photos FOLDER ...]

Each image is a mosaic of cut-outs from real photos, 512 pixels wide, so that large images have as much detail per pixel
as small ones. The photos come with scikit-image and scikit-learn, wherever they are installed. To keep these packages
out of this environment, use `pip install --target FOLDER scikit-image scikit-learn` and pass --photos FOLDER. The
conversations are as long as LLaVA's. DIR gets photos/, train.json (in LLaVA's format) and shards/.
"""

import json
import pathlib
import random
import re

from absl import app, flags

from fastvlm_jax.bench.mosaic import QUALITY, find_photos, mosaic
from fastvlm_jax.data import write
from fastvlm_jax.data.readers import Options

OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
COUNT = flags.DEFINE_integer("count", 1000, "number of images", lower_bound=1)
PHOTOS = flags.DEFINE_multi_string(
    "photos", [], "folder to search for photos, once per folder; by default the installed packages"
)
DIVIDE = flags.DEFINE_integer("divide", 1, "divisor of the image sides, for quick trials", lower_bound=1)

SIZES = ((2048, 1536), (1024, 768), (640, 480))
WORDS = re.findall(
    r"\w+",
    "the a of in on with to and is are two several small large red blue green white wooden person man woman child dog "
    "cat street table window building tree sky water bicycle car bench cup plate umbrella standing sitting holding "
    "looking walking near behind beside under background foreground appears suggests likely scene image shows left "
    "right side various colorful bright",
)


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
