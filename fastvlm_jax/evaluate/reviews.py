"""Scores a file of a judge's replies, JSON lines that name the question: {"question_id": "0", "content": "8 6\\n..."}.

Every line of NAME-PROTOCOL.judge.jsonl is a question to the judge; its reply is the "content" of a line of the review.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate.benchmark import Row
from fastvlm_jax.evaluate.standard_error import StandardError, clusters_of, interval

LEFT_OUT = "replies without a score are left out; the harnesses count them as -1 (LLaVA-Bench) or 0 (MM-Vet)"


def paired(lines: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[tuple[Row, Mapping[str, Any]]]:
    """Returns each row that has a line with the line, by "question_id" and not by place, in the order of the rows.

    Raises:
      ValueError: a line names no question, one that the benchmark lacks, or one that stands before.
    """
    known = {row.id for row in rows}
    by_id: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if "question_id" not in line:
            raise ValueError(f"line {number} of the review has no question_id: it has {', '.join(line) or 'nothing'}")
        name = str(line["question_id"])
        if name not in known:
            raise ValueError(f"line {number} of the review: the benchmark has no question {shown(name)}")
        if name in by_id:
            raise ValueError(f"line {number} of the review: the question {shown(name)} stands twice")
        by_id[name] = line
    if not by_id:
        raise ValueError("the review holds no lines")
    return [(row, by_id[row.id]) for row in rows if row.id in by_id]


def summarise_review(
    lines: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    parse: Callable[[Mapping[str, Any]], Any],
    scores: Callable[[Sequence[Any], np.ndarray], tuple[dict[str, Any], StandardError]],
    kinds: Mapping[str, Callable[[Row], Sequence[str]]],
) -> dict[str, Any]:
    """Returns the scores of a review, under the keys of a summary (results.summarise).

    Args:
      parse: returns what a line says; None if it holds no score.
      scores: returns {"score": ..., further figures} of what lines say, and the standard error of the score; its second
        argument is the cluster of each.
      kinds: kind of group -> the names of the groups of this kind that a row belongs to.
    """
    pairs = paired(lines, rows)
    said = {row.id: value for row, line in pairs if (value := parse(line)) is not None}
    known = [row for row, _ in pairs if row.id in said]
    clusters = clusters_of([_digests(row) for row in known])

    def of(places: Sequence[int]) -> tuple[dict[str, Any], StandardError]:
        return scores([said[known[place].id] for place in places], clusters[list(places)])

    unparsed = [row.id for row, _ in pairs if row.id not in said]
    figures, error = of(range(len(known))) if known else ({"score": None}, StandardError(None, "none: no scores"))
    score = figures.pop("score")
    return {
        "score": score,
        "n": len(known),
        "standard_error": error.value,
        "standard_error_method": error.method,
        "interval_95": interval(score, error.value, 0.0),
        "figures": figures,
        "groups": {
            kind: {name: _group(*of(places), len(places)) for name, places in _places(known, names).items()}
            for kind, names in kinds.items()
        },
        "unparsed": len(unparsed) / len(pairs),
        "not_scored": None if known else "not scored: the judge's replies hold no scores",
        "review": {
            "replies": len(pairs),
            "replies_without_score": unparsed,
            "questions_without_reply": len(rows) - len(pairs),
            "note": LEFT_OUT,
        },
    }


def text_of(line: Mapping[str, Any]) -> str:
    """Returns the judge's reply in a line of a review; "" if it has none."""
    content = line.get("content")
    return content if isinstance(content, str) else ""


def _group(figures: dict[str, Any], error: StandardError, count: int) -> dict[str, Any]:
    return {**figures, "standard_error": error.value, "n": count}


def _places(rows: Sequence[Row], names: Callable[[Row], Sequence[str]]) -> dict[str, list[int]]:
    """Returns group -> places of its rows, by name."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        for name in names(row):
            found.setdefault(name, []).append(place)
    return dict(sorted(found.items()))


def _digests(row: Row) -> tuple[str, ...]:
    return tuple(hashlib.sha256(picture.read()).hexdigest() for picture in row.pictures)
