"""Finds the images and questions of a benchmark in a training set.

    kind       what is the same                                                       distance
    file       the bytes of an image                                                  0
    pixels     the decoded pixels of an image, stored otherwise                       bits of the hash that differ
    near       what an image shows: encoded again, resized, cut a little, brighter    bits of the hash that differ
    question   the words of a question, without case and punctuation                  none

A training image has one match, the closest; a question may stand in the whole text of the user or in a line of it.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fastvlm_jax.data.readers import files
from fastvlm_jax.data.readers.folders import below
from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import RecordSource, read_manifest, read_shards
from fastvlm_jax.evaluate.benchmark import Picture, Row
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.records import rows_of, text_of
from fastvlm_jax.files import whole_file
from fastvlm_jax.images.similar import (
    BITS,
    NEAR,
    NEAR_PHOTOGRAPHS,
    WORDS,
    Look,
    digest,
    look_at,
    nearest,
    pixel_digest,
)

KINDS = ("file", "pixels", "near", "question")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
_BLOCK = 1024  # records whose matches are held at once


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
      hashes: uint64 [P, WORDS], perceptual hash of each image; all 0 if there is none.
      photographs: bool [P], whether it is like a photograph.
      questions: words of a question -> its rows.
      left_out: why images could not be read.
    """

    name: str
    rows: list[str]
    pictures: list[str]
    shown: list[list[int]]
    files: dict[bytes, int]
    pixels: list[bytes]
    hashes: np.ndarray
    photographs: np.ndarray
    questions: dict[str, list[int]]
    left_out: list[str]


class Match(NamedTuple):
    """Holds what a training record shares with a benchmark.

    Attributes:
      kind: one of KINDS.
      distance: bits of the hashes that differ; None for a question.
      image: number of the image in the record; None for a question.
      picture: number of the benchmark's image; None for a question.
      rows: rows of the benchmark that are concerned, the closest first.
    """

    kind: str
    distance: int | None
    image: int | None
    picture: int | None
    rows: tuple[int, ...]


@dataclasses.dataclass
class Report:
    """Counts the matches of a training set.

    Attributes:
      records: number of records that were looked at.
      images: number of their images.
      by_kind: kind -> {"records", "images", "rows"}: records and images that match, rows of the benchmark concerned.
      matching: number of records with any match.
      both: number of records that hold an image and the question of one row.
      left_out: why records or images could not be looked at.
    """

    records: int = 0
    images: int = 0
    by_kind: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    matching: int = 0
    both: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)


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
        if benchmark not in BENCHMARKS:
            raise ValueError(f"--benchmark {benchmark}: there is none of that name; there are {', '.join(BENCHMARKS)}")
        inner = path / benchmark
        return benchmark, BENCHMARKS[benchmark].read(inner if inner.is_dir() else path)
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
    known = Known(
        name, [row.id for row in rows], [], [], {}, [], np.zeros((0, WORDS), np.uint64), np.zeros(0, bool), questions,
        left_out,
    )  # fmt: skip
    looks: list[Look] = []
    wanted = list(pictures.values()) if set(kinds) - {"question"} else []
    for picture, found in zip(wanted, _in_threads(lambda one: _learn_picture(one, kinds), wanted), strict=True):
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
    if not looks:
        return known
    return dataclasses.replace(
        known, hashes=np.stack([look.hash for look in looks]), photographs=np.array([look.photograph for look in looks])
    )


def _learn_picture(picture: Picture, kinds: Sequence[str]) -> tuple[bytes, bytes, Look] | ValueError:
    try:
        data = picture.read()
        if not {"pixels", "near"} & set(kinds):
            return digest(data), b"", Look(np.zeros(WORDS, np.uint64), False)
        return digest(data), pixel_digest(data) if "pixels" in kinds else b"", look_at(data)
    except ValueError as error:
        return error


def words_of(text: str) -> str:
    """Returns the words of a text, as they are compared: of Unicode's NFKC, without case, signs and line breaks."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def compare(
    source: RecordSource,
    known: Known,
    kinds: Sequence[str] = KINDS,
    output: str | os.PathLike | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Compares every record of a training set with a benchmark.

    Args:
      kinds: kinds of matches that are looked for.
      output: file for the list of matches, a JSON object a line: "key" and "split" of the record, "kind", "distance",
        "image", and "benchmark", "row" and "picture" of the match; of a question its words, and whether the record
        holds an image of that row.
      progress: function that is called with the number of records since its last call.
    """
    report, concerned = Report(), {kind: set() for kind in kinds}
    report.by_kind = {kind: {"records": 0, "images": 0, "rows": 0} for kind in kinds}
    path = pathlib.Path(output or os.devnull).expanduser()
    with whole_file(path, "w") if output else path.open("w") as file:
        for key, images, matches, reasons in _in_threads(
            lambda i: _look_at_record(source, i, known, kinds), range(len(source))
        ):
            report.records += 1
            report.images += images
            report.left_out += reasons
            report.matching += bool(matches)
            of_images = {row for match in matches if match.kind != "question" for row in match.rows}
            report.both += any(of_images.intersection(match.rows) for match in matches if match.kind == "question")
            for kind in {match.kind for match in matches}:
                report.by_kind[kind]["records"] += 1
            for match in matches:
                report.by_kind[match.kind]["images"] += match.image is not None
                concerned[match.kind].update(match.rows)
                file.write(json.dumps(_line(key, source.split, match, known, of_images)) + "\n")
            if progress:
                progress(1)
    for kind in kinds:
        report.by_kind[kind]["rows"] = len(concerned[kind])
    return report


def _line(key: str, split: str, match: Match, known: Known, of_images: set[int]) -> dict[str, Any]:
    line = {
        "key": key, "split": split, "kind": match.kind, "distance": match.distance, "image": match.image,
        "benchmark": known.name, "row": known.rows[match.rows[0]],
    }  # fmt: skip
    if match.kind == "question":
        return line | {"rows": len(match.rows), "same_image": not of_images.isdisjoint(match.rows)}
    return line | {"picture": known.pictures[match.picture]}


def _look_at_record(source: RecordSource, number: int, known: Known, kinds: Sequence[str]):
    """Returns the key of a record, the number of its images, its matches, and why something could not be looked at."""
    try:
        record = source[number]
    except ValueError as error:
        return "", 0, [], [str(error)]
    matches, reasons = [], []
    for image, data in enumerate(record.images):
        try:
            if match := _match_image(data, image, known, kinds):
                matches.append(match)
        except ValueError as error:
            reasons.append(f"{record.key} image {image}: {error}")
    if known.questions:
        texts = [text_of(turn) for turn in record.turns if turn[0] == "user"]
        asked = {words_of(part) for text in texts for part in (text, *text.splitlines())}
        for words in sorted(asked & known.questions.keys()):
            matches.append(Match("question", None, None, None, tuple(known.questions[words])))
    return record.key, len(record.images), matches, reasons


def _match_image(data: bytes, image: int, known: Known, kinds: Sequence[str]) -> Match | None:
    """Returns the closest match of a training image, None if there is none."""
    if "file" in kinds and (number := known.files.get(digest(data))) is not None:
        return Match("file", 0, image, number, tuple(known.shown[number]))
    if not {"pixels", "near"} & set(kinds) or not len(known.hashes):
        return None
    look = look_at(data)
    near, apart = nearest(look, known.hashes, known.photographs)
    if "pixels" in kinds and len(near):
        pixels = pixel_digest(data)
        for number, distance in zip(near.tolist(), apart.tolist(), strict=True):
            if known.pixels[number] == pixels:
                return Match("pixels", distance, image, number, tuple(known.shown[number]))
    if "near" not in kinds or not len(near) or not look.hash.any():  # images of one colour are like nothing
        return None
    rows = tuple(dict.fromkeys(row for number in near.tolist() for row in known.shown[number]))
    return Match("near", int(apart[0]), image, int(near[0]), rows)


def _in_threads(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields work(item) of each item in order; few results are held at once."""
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(items), _BLOCK):
            yield from pool.map(work, items[start : start + _BLOCK])


def describe(report: Report, known: Known, data: str) -> str:
    """Returns the text that `fastvlm data inspect --against` prints."""
    lines = [
        f"{data}: {report.records:,} records, {report.images:,} images",
        f"against {known.name}: {len(known.rows):,} rows, {len(known.pictures):,} different images, "
        f"{len(known.questions):,} different questions",
        "",
        f"  {'kind':<9}{'records':>10}{'images':>10}{'rows of the benchmark':>24}",
    ]
    for kind, found in report.by_kind.items():
        images = "" if kind == "question" else f"{found['images']:,}"
        lines.append(f"  {kind:<9}{found['records']:>10,}{images:>10}{found['rows']:>24,}")
    lines += [
        "",
        f"{report.matching:,} records match; {report.both:,} of them hold an image and the question of one row",
    ]
    if "near" in report.by_kind:
        lines.append(
            f"near: at most {NEAR} of the hash's {BITS} bits differ, {NEAR_PHOTOGRAPHS} between two photographs"
        )
    for what, reasons in (("the benchmark", known.left_out), (data, report.left_out)):
        if reasons:
            lines.append(f"could not be looked at in {what}: {len(reasons):,}, as {most_frequent(reasons)[1][0][1]}")
    return "\n".join(lines)
