"""Writes the HTML page of predictions: image, prompt, answer, references and score of each row, with filters."""

import math
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.evaluate.benchmark import Mark, Result
from fastvlm_jax.evaluate.shown_images import write_images
from fastvlm_jax.files import write_whole
from fastvlm_jax.report.predictions_page import render

PAGE = "predictions.html"
ROWS = 300  # most rows of a benchmark on the page
TEXT = 8000  # most characters of a text on the page
VERDICTS = ("right", "partly", "wrong", "unparsed", "not scored")


def write_page(
    folder: str | os.PathLike, evaluated: Sequence[tuple[dict[str, Any], Sequence[Result]]], rows: int = ROWS
) -> pathlib.Path:
    """Writes predictions.html into a folder, with its images in predictions_images beside it, and returns its path.

    Args:
      folder: folder to write into; it is made if needed.
      evaluated: (summary, results) of each benchmark; see evaluate/results.py.
      rows: most rows of a benchmark on the page; of more, `choose` draws them.
    """
    folder = pathlib.Path(folder)
    chosen = [choose(results, rows) for _, results in evaluated]
    files = [write_images(folder, results) for results in chosen]
    data = {
        "benchmarks": [
            _benchmark(summary, results, len(few)) for (summary, results), few in zip(evaluated, chosen, strict=True)
        ],
        "rows": [_row(number, result, files[number]) for number, results in enumerate(chosen) for result in results],
        "verdicts": VERDICTS,
    }
    write_whole(folder / PAGE, render(data, rows).encode("utf-8", "replace"))
    return folder / PAGE


def choose(results: Sequence[Result], count: int) -> list[Result]:
    """Returns at most `count` results in their order, with each verdict in its real proportion.

    The shares are rounded by the largest remainder, and the results of a verdict are drawn with a fixed seed.
    """
    if len(results) <= count:
        return list(results)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, result in enumerate(results):
        kinds.setdefault((verdict(result.mark), unparsed(result.mark)), []).append(i)
    shares = {kind: count * len(members) / len(results) for kind, members in kinds.items()}
    quotas = {kind: math.floor(share) for kind, share in shares.items()}
    by_remainder = sorted(kinds, key=lambda kind: (quotas[kind] - shares[kind], kind))
    for kind in by_remainder[: count - sum(quotas.values())]:
        quotas[kind] += 1
    draw = random.Random(0)
    drawn = [i for kind in sorted(kinds) for i in draw.sample(kinds[kind], quotas[kind])]
    return [results[i] for i in sorted(drawn)]


def verdict(mark: Mark | None) -> str:
    """Returns "right" for a full score, "wrong" for none, "partly" between them, and "not scored"."""
    if mark is None:
        return "not scored"
    return "right" if mark.score >= 1 else "wrong" if mark.score <= 0 else "partly"


def unparsed(mark: Mark | None) -> bool:
    """Returns whether the rule could read nothing in the answer."""
    return mark is not None and mark.parsed is None


def _benchmark(summary: dict[str, Any], results: Sequence[Result], shown: int) -> dict[str, Any]:
    """Returns what the head of the page tells of a benchmark."""
    protocol, share = summary["protocol"], summary["unparsed"]
    groups = [
        (f"{kind}: {name}", *_score(group), group["n"])
        for kind, names in summary["groups"].items()
        for name, group in names.items()
    ]
    score, error = _score(summary)
    return {
        "name": summary["benchmark"],
        "title": summary["title"],
        "protocol": f"{protocol['name']} ({protocol['version']})",
        "rule": protocol["rule"],
        "metric": summary["metric"],
        "score": score,
        "error": error,
        "why": summary["not_scored"],
        "figures": _figures(summary["figures"]),
        "groups": groups,
        "left_out": summary["left_out"]["questions"],
        "n": len(results),
        "shown": shown,
        "unparsed": f"{100 * share:.1f} %" if share else "",
    }


def _figures(figures: dict[str, Any]) -> str:
    """Returns the numbers among the figures of a summary as text, each with its standard error "NAME_stderr"."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    errors = {name: f" ± {numbers[f'{name}_stderr']:.2g}" for name in numbers if f"{name}_stderr" in numbers}
    shown = [name for name in numbers if not name.endswith("_stderr")]
    return ", ".join(f"{name.replace('_', ' ')} {numbers[name]:,.4g}{errors.get(name, '')}" for name in shown)


def _score(part: dict[str, Any]) -> tuple[str, str]:
    """Returns the score and the standard error of a summary or of a group in it, as text."""
    score, error = part["score"], part["standard_error"]
    return "" if score is None else f"{score:.1f}", "" if error is None else f"{error:.2g}"


def _row(number: int, result: Result, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the benchmark of that number as the page's script reads it."""
    mark, row = result.mark, result.row
    return {
        "benchmark": number,
        "id": clipped(row.id),
        "prompt": clipped(result.prompt),
        "answer": clipped(result.answer),
        "parsed": clipped(mark.parsed) if mark and mark.parsed is not None else "",
        "references": [clipped(text) for text in row.references or ()],
        "score": round(mark.score, 3) if mark else 0,
        "verdict": verdict(mark),
        "unparsed": unparsed(mark),
        "groups": {name: str(value) for name, value in row.groups.items()},
        "images": [files[picture.name] | {"name": picture.name} for picture in row.pictures],
    }


def clipped(text: str) -> str:
    """Returns a text, whose middle is left out if it is very long."""
    if len(text) <= TEXT:
        return text
    return f"{text[: TEXT // 2]}\n... {len(text) - TEXT:,} more characters ...\n{text[-TEXT // 2 :]}"
