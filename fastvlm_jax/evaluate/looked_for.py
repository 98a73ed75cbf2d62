"""Looks at what is looked for in a training set: the images and questions of a benchmark, of shards or of a folder."""

import concurrent.futures
import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers import files
from fastvlm_jax.data.readers.folders import below
from fastvlm_jax.data.sources import read_manifest, read_shards
from fastvlm_jax.evaluate.benchmark import Picture, Row
from fastvlm_jax.evaluate.benchmarks import folder_of, known
from fastvlm_jax.evaluate.records import rows_of
from fastvlm_jax.images.similar import NOTHING, Look, digest, look_at, pixel_digest, stacked

KINDS = ("file", "pixels", "near", "question")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
_BLOCK = 1024  # results that are held at once


@dataclasses.dataclass(frozen=True)
class Known:
    """Holds what is known of a benchmark: its B rows, its P different images and its questions.

    Attributes:
      name: its name on the command line, or the folder.
      rows: id of each row.
      pictures: name of each image.
      shown: rows that show each image.
      files: digest of the file of an image -> its number.
      pixels: digest of the pixels of each image; b"" if these are not compared.
      looks: how the images look, `stacked`.
      questions: words of a question -> its rows.
      left_out: why images could not be read.
    """

    name: str
    rows: list[str]
    pictures: list[str]
    shown: list[list[int]]
    files: dict[bytes, int]
    pixels: list[bytes]
    looks: Look
    questions: dict[str, list[int]]
    left_out: list[str]


def open_rows(folder: str, benchmark: str | None, data: str, split: str) -> tuple[str, list[Row]]:
    """Returns the name and the rows of what a training set is compared with.

    Args:
      folder: published files of a benchmark, also in a subfolder of its name; or shards; or images.
      benchmark: name of the benchmark; None for shards and images.
      data, split: the training set. If `folder` is the same, its other splits are read.

    Raises:
      FileNotFoundError, ValueError: the folder holds none of these, or there is no such benchmark.
    """
    path = epath.Path(folder).expanduser()
    if benchmark is not None:
        (own,) = known([benchmark])
        return benchmark, own.read(folder_of(own, path, single=True))
    if not path.is_dir():
        raise FileNotFoundError(f"--against {folder}: there is no such folder")
    if splits := read_manifest(path)["splits"]:
        same = os.path.realpath(path) == os.path.realpath(os.path.expanduser(data))
        chosen = [name for name in splits if not (same and name == split)]
        if not chosen:
            raise ValueError(f"--against {folder} is --data itself, which has no other split than {split!r}")
        rows = [
            dataclasses.replace(row, id=f"{name}/{row.id}")
            for name in chosen
            for row in rows_of(read_shards(path, name), "separate")
        ]
        return folder, rows
    found = sorted(image for suffix in _IMAGES for image in below(path, suffix))
    if not found:
        raise FileNotFoundError(
            f"--against {folder} holds no images and no shards: if these are the published files of a benchmark, name "
            "it with --benchmark (`fastvlm evaluate --list` lists them)"
        )
    images = files.ImagesFolder((path,))
    names = [os.fspath(image.relative_to(path)) for image in found]
    return folder, [
        Row(name, "", (Picture(name, lambda name=name: files.read_image(images, name)),), None) for name in names
    ]


def learn(name: str, rows: Sequence[Row], kinds: Sequence[str] = KINDS) -> Known:
    """Looks at the images and questions of a benchmark; images of equal bytes are one.

    Raises:
      ValueError: none of its images can be read.
    """
    shown: dict[str, list[int]] = {}  # rows of each picture, by its name
    pictures: dict[str, Picture] = {}
    questions: dict[str, list[int]] = {}
    left_out = [str(row.fields["unusable"]) for row in rows if "unusable" in row.fields]
    for number, row in enumerate(rows):
        for picture in row.pictures:
            pictures.setdefault(picture.name, picture)
            shown.setdefault(picture.name, []).append(number)
        if "question" in kinds and (words := words_of(row.question)):
            questions.setdefault(words, []).append(number)
    known = Known(name, [row.id for row in rows], [], [], {}, [], stacked([]), questions, left_out)
    looks: list[Look] = []
    wanted = list(pictures.values()) if set(kinds) - {"question"} else []
    for picture, found in zip(wanted, in_threads(lambda one: _learn_picture(one, kinds), wanted), strict=True):
        if isinstance(found, ValueError):
            left_out.append(f"{picture.name}: {found}")
            continue
        file, pixels, look = found
        number = known.files.setdefault(file, len(known.pictures))
        if number < len(known.pictures):
            known.shown[number].extend(shown[picture.name])
            continue
        known.pictures.append(picture.name)
        known.shown.append(shown[picture.name])
        known.pixels.append(pixels)
        looks.append(look)
    if wanted and not looks:
        raise ValueError(f"none of the {len(wanted):,} images of {name} can be read: {left_out[-1]}")
    return dataclasses.replace(known, looks=stacked(looks))


def _learn_picture(picture: Picture, kinds: Sequence[str]) -> tuple[bytes, bytes, Look] | ValueError:
    try:
        data = picture.read()
        if not {"pixels", "near"} & set(kinds):
            return digest(data), b"", NOTHING
        return digest(data), pixel_digest(data) if "pixels" in kinds else b"", look_at(data)
    except ValueError as error:
        return error


def words_of(text: str) -> str:
    """Returns the words of a text, as they are compared: of Unicode's NFKC, without case, signs and line breaks."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields work(item) of each item in order; few results are held at once."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(items), _BLOCK):
            yield from pool.map(work, items[start : start + _BLOCK])
