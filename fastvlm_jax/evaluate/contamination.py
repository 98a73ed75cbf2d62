"""Finds the images and questions of a benchmark in a training set.

    kind       what is the same                                                       distance
    file       the bytes of an image                                                  0
    pixels     the decoded pixels of an image, stored otherwise                       bits of the hash that differ
    near       what an image shows: encoded again, resized, cut a little, brighter    bits of the hash that differ
    question   the words of a question, without case and punctuation                  none

A training image has one match, the closest; a question may stand in the whole text of the user or in a line of it.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.evaluate.looked_for import KINDS, Known, in_threads, words_of
from fastvlm_jax.evaluate.records import text_of
from fastvlm_jax.files import whole_file
from fastvlm_jax.images.similar import BITS, NEAR, NEAR_PHOTOGRAPHS, digest, look_at, nearest, pixel_digest


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
      by_image: number of records that share an image.
      both: number of records that hold an image and the question of one row.
      left_out: why records or images could not be looked at.
    """

    records: int = 0
    images: int = 0
    by_kind: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    matching: int = 0
    by_image: int = 0
    both: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)


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
        for key, images, matches, reasons in in_threads(
            lambda i: _look_at_record(source, i, known, kinds), range(len(source))
        ):
            report.records += 1
            report.images += images
            report.left_out += reasons
            report.matching += bool(matches)
            report.by_image += any(match.kind != "question" for match in matches)
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
    if not {"pixels", "near"} & set(kinds) or not known.pictures:
        return None
    look = look_at(data)
    near, apart = nearest(look, known.looks)
    if "pixels" in kinds and len(near):
        pixels = pixel_digest(data)
        for number, distance in zip(near.tolist(), apart.tolist(), strict=True):
            if known.pixels[number] == pixels:
                return Match("pixels", distance, image, number, tuple(known.shown[number]))
    if "near" not in kinds or not len(near) or not look.hash.any():  # images of one colour are like nothing
        return None
    rows = tuple(dict.fromkeys(row for number in near.tolist() for row in known.shown[number]))
    return Match("near", int(apart[0]), image, int(near[0]), rows)


def describe(report: Report, known: Known, data: str) -> str:
    """Returns the text that `fastvlm data inspect --against` prints."""
    questions, images = "question" in report.by_kind, len(report.by_kind) > ("question" in report.by_kind)
    sides = [f"{len(known.pictures):,} different images"] * images
    sides += [f"{len(known.questions):,} different questions"] * questions
    lines = [
        f"{data}: {report.records:,} records, {report.images:,} images",
        f"against {known.name}: {len(known.rows):,} rows, {' and '.join(sides)}",
        "",
        f"  {'kind':<9}{'records':>10}{'images':>10}{'rows of the benchmark':>24}",
    ]
    for kind, found in report.by_kind.items():
        count = "" if kind == "question" else f"{found['images']:,}"
        lines.append(f"  {kind:<9}{found['records']:>10,}{count:>10}{found['rows']:>24,}")
    lines += ["", f"{report.matching:,} records match"]
    if questions and images:
        lines[-1] += (
            f": {report.by_image:,} by an image ({report.both:,} of them hold the question of one of its rows too), "
            f"{report.matching - report.by_image:,} by a question alone"
        )
        if report.matching > report.by_image:
            lines.append("a question alone may be asked about any image: --kinds file,pixels,near leaves these out")
    if "near" in report.by_kind:
        lines.append(
            f"near: at most {NEAR} of the hash's {BITS} bits differ, {NEAR_PHOTOGRAPHS} between two photographs"
        )
    for what, reasons in (("the benchmark", known.left_out), (data, report.left_out)):
        if reasons:
            lines.append(f"could not be looked at in {what}: {len(reasons):,}, as {most_frequent(reasons)[1][0][1]}")
    return "\n".join(lines)
