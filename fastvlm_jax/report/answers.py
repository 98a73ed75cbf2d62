"""Draws how a run's answers to its sample questions change over the steps, from predictions.jsonl in its workdir."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm_jax.evaluate.shown_images import FOLDER
from fastvlm_jax.images.decode import decode
from fastvlm_jax.metrics.predictions import FILE
from fastvlm_jax.metrics.rows import read_rows
from fastvlm_jax.report.curves import plt

SHOWN = 12  # most questions on the sheet
CHANGES = 5  # most answers to a question on it: the first and the last ones
WIDTH = 46  # characters of a line
RIGHT, WRONG = "#116622", "#bb1111"

Answers = dict[str, list[dict[str, Any]]]  # id of a question -> its rows, by step


def read_answers(workdir: pathlib.Path) -> Answers:
    """Returns the answers to each sample question of a run; of equal answers in a row the first alone. {} without any.

    Rows of a run that was killed and went on come once.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_rows(workdir / FILE):
        found.setdefault(row["id"], {})[row["step"]] = row
    answers: Answers = {}
    for key, by_step in found.items():
        rows = [by_step[step] for step in sorted(by_step)]
        changed = [
            row
            for row, before in zip(rows, [None, *rows], strict=False)
            if row["answer"] != (before or {}).get("answer")
        ]
        answers[key] = changed
    return answers


def plot_answers(workdir: pathlib.Path, answers: Answers, path: pathlib.Path) -> None:
    """Draws a sheet: each image, and beside it question, truth and the steps at which the answer changed."""
    few = list(answers.values())[:SHOWN]
    lines = -(-len(few) // 2)
    figure, axes = plt.subplots(
        lines, 4, figsize=(12, 2.3 * lines + 0.5), squeeze=False, gridspec_kw={"width_ratios": [1, 1.9, 1, 1.9]}
    )
    for axis in axes.flat:
        axis.axis("off")
    for number, rows in enumerate(few):
        image, words = axes[number // 2][2 * (number % 2) :][:2]
        if (pixels := _pixels(workdir, rows[-1])) is not None:
            image.imshow(pixels, interpolation="nearest")
            image.set_anchor("N")
        _write(words, rows)
    figure.suptitle("answers to the sample questions, at each step at which they changed (green = right)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _write(axis, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a question, its truth and its answers below each other."""
    kept = rows if len(rows) <= CHANGES else [rows[0], *rows[1 - CHANGES :]]
    last = rows[-1]
    truth = "; ".join(last["references"])
    lines = [(textwrap.shorten(last["question"], 2 * WIDTH, placeholder="..."), "black", "bold")]
    lines.append((f"truth: {textwrap.shorten(truth, WIDTH, placeholder='...')}", "0.4", "normal"))
    for row in kept:
        answer = textwrap.shorten(row["answer"], WIDTH, placeholder="...") or "(nothing)"
        lines.append((f"step {row['step']:,}: {answer}", RIGHT if row["score"] == 1 else WRONG, "normal"))
    height = 0.98
    for words, colour, weight in lines:
        words = textwrap.fill(words, WIDTH)
        axis.text(0, height, words, va="top", fontsize=9, color=colour, weight=weight, parse_math=False)
        height -= 0.125 * (1 + words.count("\n"))


def _pixels(workdir: pathlib.Path, row: Mapping[str, Any]):
    """Returns the first image of a row, uint8 [H, W, 3]; None if it has none that can be read."""
    for name in row["images"][:1]:
        try:
            return decode((workdir / FOLDER / pathlib.PurePath(name).name).read_bytes())
        except (OSError, ValueError):
            return None
    return None
