"""Reads the formats that data sets are published in, one entry at a time.

Each format has a module with three functions:

    recognise(path) -> bool                         guesses by names and a first look at the files; never raises
    parts(path, options) -> list[Part]              splits a source into parts, in a fixed order; errors are one line
    read(part, options) -> Iterator of records      yields the entries of a part in order; a broken one is a Rejected

The libraries of a format are imported only when its module is first needed. No format needs JAX.
"""

import dataclasses
from typing import NamedTuple


class Part(NamedTuple):
    """Describes a file or the range [start, stop) in it; the reader chooses the unit (entries, bytes, row groups)."""

    path: str
    start: int = 0
    stop: int = -1  # -1 for the end of the file


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds what a reader must know and cannot find in the source.

    Attributes:
      images: folder that image paths are relative to, or several, of which each path is looked up in the first that has
        it; "" for the folder of the file that names them.
      questions: questions about images that have only a caption; the record's key picks one. Without any, the user's
        turn is the image alone.
      split: split to read, in a source that has several.
      follow_links: whether links in a folder of images may lead out of all of these folders.
      pictures: folder of tars with the pictures that the source's tars of the same names lack, see joined.py; "" if
        there are none.
      synthetic_keys: regular expression of the keys of a tar's syn.json whose captions are taken.
      keep_augmentations: augmentations of an entry that are kept, the first ones; 0 for all.
      keep_captions: synthetic captions of an entry that are kept, the first ones; 0 for all.
      boxes: picture whose pixels the boxes of augmentations count, see boxes.py; "" for the one that is stored.
    """

    images: str | tuple[str, ...] = ""
    questions: tuple[str, ...] = ()
    split: str = "train"
    follow_links: bool = False
    pictures: str = ""
    synthetic_keys: str = "^syn_text.*$"
    keep_augmentations: int = 0
    keep_captions: int = 0
    boxes: str = ""

    @property
    def roots(self) -> tuple[str, ...]:
        """Returns the folders that `images` names."""
        return tuple(filter(None, (self.images,) if isinstance(self.images, str) else self.images))
