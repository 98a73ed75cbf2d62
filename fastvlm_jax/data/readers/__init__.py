"""Reads the formats that data sets are published in, one entry at a time.

Each format has a module with three functions:

    recognise(path) -> bool                         guesses by names and a first look at the files; never raises
    parts(path, options) -> list[Part]              splits a source into parts, in a fixed order; errors are one line
    read(part, options) -> Iterator of records      yields the entries of a part in order; a broken one is a Rejected

The libraries of a format are imported only when its module is first needed. No format needs JAX.
"""

import dataclasses
import importlib
import types
from typing import NamedTuple

from etils import epath

# Format -> what it reads. Formats are tried in this order, the most reliably recognised first.
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
    """Describes a file or the range [start, stop) in it; the reader chooses the unit (entries, bytes, row groups)."""

    path: str
    start: int = 0
    stop: int = -1  # -1 for the end of the file


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds what a reader must know and cannot find in the source.

    Attributes:
      images: folder that image paths are relative to; "" for the folder of the file that names them.
      questions: questions about images that have only a caption; the record's key picks one. Without any, the user's
        turn is the image alone.
      split: split to read, in a source that has several.
    """

    images: str = ""
    questions: tuple[str, ...] = ()
    split: str = "train"


def reader(name: str) -> types.ModuleType:
    """Returns the module that reads the format `name`; raises ValueError if there is no such format."""
    if name not in READERS:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(READERS)}")
    return importlib.import_module(f"{__name__}.{name}")


def recognise(path: epath.Path) -> str:
    """Returns the name of the format of `path`, a file or a folder.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: `path` is in none of the known formats; the message lists them.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    for name in READERS:
        if reader(name).recognise(path):
            return name
    known = "; ".join(f"{name}: {what}" for name, what in READERS.items())
    raise ValueError(f"{path} is in no known format ({known}): choose one with --format")
