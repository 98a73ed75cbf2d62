"""The formats that data sets are published in, read one entry at a time.

A module a format, of three functions each:

    recognise(path) -> bool                         a guess by names and a first look; never raises
    parts(path, options) -> list[Part]              the work to share out, in a fixed order; one-line errors
    read(part, options) -> Iterator of records      the entries of a part in order; a broken one is a Rejected

No format's libraries are imported before it is asked for, and none needs jax.
"""

import dataclasses
import importlib
import types
from typing import NamedTuple

from etils import epath

# Name to what it reads; asked in this order, so those that are surest of themselves come first.
READERS = {
    "shards": "a folder that `fastvlm data write` wrote",
    "tfds": "a TFDS data set stored as ArrayRecord",
    "webdataset": ".tar files",
    "parquet": ".parquet files",
    "pdf": ".pdf files",
    "table": ".csv or .tsv of image and caption",
    "llava": ".json or .jsonl of conversations",
}


class Part(NamedTuple):
    """A file, or what lies in [start, stop) of it; the reader chooses the unit (entries, bytes, row groups)."""

    path: str
    start: int = 0
    stop: int = -1  # the end of the file


@dataclasses.dataclass(frozen=True)
class Options:
    """What a source does not say itself.

    Attributes:
      images: folder that relative image paths start from; "" for the folder of the file that names them.
      questions: asked about an image that has but a caption, one picked by the record's key; none: image, then caption.
      split: which split of a source that has several.
    """

    images: str = ""
    questions: tuple[str, ...] = ()
    split: str = "train"


def reader(name: str) -> types.ModuleType:
    """Returns the module that reads the format `name`; ValueError for an unknown one."""
    if name not in READERS:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(READERS)}")
    return importlib.import_module(f"{__name__}.{name}")


def recognise(path: epath.Path) -> str:
    """Returns the name of the format that `path`, a file or a folder, is in.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: it is none of the known formats.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    for name in READERS:
        if reader(name).recognise(path):
            return name
    known = "; ".join(f"{name}: {what}" for name, what in READERS.items())
    raise ValueError(f"{path} is in no known format ({known}): choose one with --format")
