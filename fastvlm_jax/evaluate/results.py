"""Makes the summary of a benchmark from its results, and writes and reads the files of both.

NAME-PROTOCOL.json                 the summary: score, standard error, groups, protocol, model, versions
NAME-PROTOCOL.predictions.jsonl    a line for each question: prompt, answer, what the rule read in it, score
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from fastvlm_jax import files
from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.evaluate import standard_error
from fastvlm_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Result, Row
from fastvlm_jax.evaluate.published import read_lines

# Keys of a line of predictions, and the types of their values.
PREDICTION = {
    "id": str, "benchmark": str, "protocol": str, "question": str, "prompt": str, "answer": str, "parsed": str | None,
    "references": list | None, "score": int | float | None, "groups": dict, "images": list,
}  # fmt: skip


def summarise(
    benchmark: Benchmark,
    protocol: Protocol,
    results: Sequence[Result],
    *,
    max_tokens: int | None = None,
    left_out: Sequence[tuple[str, str]] = (),
    seconds: float = 0.0,
    answered: int | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the summary of a benchmark, JSON values.

    Scores of means are percent, with a standard error and a 95 % interval in the same unit; `groups` holds the mean of
    each group. Without references, or where only a judge can score, "score" is None and "not_scored" says why.

    Args:
      max_tokens: longest answer that was asked for, tokens; by default the protocol's.
      left_out: (id, reason) of each row that was not asked.
      seconds: time that answering took.
      answered: number of questions that were answered in that time; by default all. The others were in a journal.
      lineage: where the model comes from.
    """
    scored = [result for result in results if result.mark is not None]
    _, reasons = most_frequent(reason for _, reason in left_out)
    answered = len(results) if answered is None else answered
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "protocol": {
            "name": protocol.name,
            "version": protocol.version,
            "rule": protocol.rule,
            "max_tokens": protocol.max_tokens if max_tokens is None else max_tokens,
        },
        "metric": benchmark.metric,
        **_scores(protocol, scored),
        "not_scored": None if scored else _why_not(benchmark, protocol, results),
        "questions": len(results),
        "questions_published": benchmark.size,
        "left_out": {"questions": len(left_out), "reasons": {reason: count for count, reason in reasons}},
        "first_prompt": results[0].prompt if results else None,
        "model": dict(lineage or {}),
        "versions": {name: importlib.metadata.version(name) for name in ("fastvlm_jax", "jax", "jaxlib")},
        "seconds": round(seconds, 3),
        "questions_per_second": round(answered / seconds, 3) if seconds and answered else None,
    }


def score_of(protocol: Protocol, scored: Sequence[Result]) -> float | None:
    """Returns the score of results that have marks, as it is published; None without any."""
    if not scored:
        return None
    if protocol.aggregate is not None:
        return float(protocol.aggregate(scored))
    return 100 * math.fsum(result.mark.score for result in scored) / len(scored)


def _scores(protocol: Protocol, scored: Sequence[Result]) -> dict[str, Any]:
    """Returns the part of a summary that is computed from marks."""
    clusters = standard_error.clusters_of([result.images for result in scored])
    marks = np.array([result.mark.score for result in scored], np.float64)
    score, high = score_of(protocol, scored), math.inf
    if not scored:
        error = standard_error.StandardError(None, "none: nothing is scored")
    elif protocol.aggregate is not None:
        error = standard_error.of_aggregate(scored, clusters, protocol.aggregate)
    else:
        error, high = standard_error.of_mean(100 * marks, clusters), 100.0
    return {
        "score": score,
        "n": len(scored),
        "standard_error": error.value,
        "standard_error_method": error.method,
        "interval_95": standard_error.interval(score, error.value, 0.0, high),
        "groups": _groups(scored, 100 * marks, clusters),
        "figures": dict(protocol.figures(scored)) if protocol.figures and scored else {},
        "unparsed": sum(result.mark.parsed is None for result in scored) / len(scored) if scored else None,
    }


def _groups(scored: Sequence[Result], marks: np.ndarray, clusters: np.ndarray) -> dict[str, dict[str, Any]]:
    """Returns kind of group -> group, by name -> mean score in percent, standard error and number of questions."""
    members: dict[str, dict[str, list[int]]] = {}
    for i, result in enumerate(scored):
        for kind, name in result.row.groups.items():
            members.setdefault(kind, {}).setdefault(name, []).append(i)
    return {
        kind: {
            name: {
                "score": float(marks[rows].mean()),
                "standard_error": standard_error.of_mean(marks[rows], clusters[rows]).value,
                "n": len(rows),
            }
            for name, rows in sorted(groups.items())
        }
        for kind, groups in members.items()
    }


def _why_not(benchmark: Benchmark, protocol: Protocol, results: Sequence[Result]) -> str:
    name = f"{benchmark.name}-{protocol.name}"
    if not results:
        return "not scored: no question was answered"
    if protocol.judge and any(result.row.references is not None for result in results):
        return (
            f"not scored: only a judge can score it; {name}.judge.jsonl is what to ask it, --review reads its replies"
        )
    send = f": send {name}.submission.json to the benchmark's server" if benchmark.submission else ""
    return f"not scored: the references are not public{send}"


def predictions(benchmark: Benchmark, protocol: Protocol, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the lines of the file of predictions, JSON values, in the order of the results."""
    return [
        {
            "id": result.row.id,
            "benchmark": benchmark.name,
            "protocol": protocol.name,
            "question": result.row.question,
            "prompt": result.prompt,
            "answer": result.answer,
            "parsed": None if result.mark is None else result.mark.parsed,
            "references": None if result.row.references is None else list(result.row.references),
            "score": None if result.mark is None else float(result.mark.score),
            "groups": dict(result.row.groups),
            "images": [
                {"name": picture.name, "digest": digest}
                for picture, digest in zip(_shown(protocol, result.row), result.images, strict=True)
            ],
        }
        for result in results
    ]


def _shown(protocol: Protocol, row: Row) -> list[Picture]:
    """Returns the images of a row that its prompt shows, in the order of Result.images."""
    numbers = {part for _, content in protocol.prompt(row) for part in content if isinstance(part, int)}
    return [row.pictures[number] for number in sorted(numbers)]


def write_lines(path: os.PathLike, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines to a file that appears only when it is complete."""
    files.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_predictions(path: os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a file of predictions, which are all of one benchmark and protocol.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another or a damaged file; the message names it, the line and the key.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; `fastvlm evaluate --output` writes *.predictions.jsonl")
    try:
        lines = read_lines(path)
    except ValueError as error:
        raise ValueError(f"{error}: it is no whole file of predictions of `fastvlm evaluate`") from error
    if not lines:
        raise ValueError(f"{path} holds no predictions")
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        for key, kind in PREDICTION.items():
            if key not in line or not isinstance(line[key], kind) or isinstance(line[key], bool):
                what = "no" if key not in line else "a wrong"
                raise ValueError(f"{where} has {what} {key!r}: it is no file of predictions of `fastvlm evaluate`")
        if line["score"] is not None and not 0 <= line["score"] <= 1:
            raise ValueError(f"{where}: its score {line['score']} is not between 0 and 1")
        if any(not isinstance(image, dict) or not isinstance(image.get("digest"), str) for image in line["images"]):
            raise ValueError(f"{where}: an image of it has no digest")
        if line["id"] in seen:
            raise ValueError(f"{where}: its id {line['id']!r} stands twice")
        seen.add(line["id"])
        for key in ("benchmark", "protocol"):
            if line[key] != lines[0][key]:
                raise ValueError(f"{where} is of the {key} {line[key]!r}, and line 1 of {lines[0][key]!r}")
    return lines
