"""Makes the table of several benchmarks: the scores of one model, and beside them the paper's of the same model.

benchmark              score   95 %       n  protocol   15+1.1  15+12.5
GQA, testdev balanced   61.2  ± 0.9  12,578  paper        61.6     63.1
DocVQA, validation *    60.8  ± 1.3   5,349  paper        61.0     70.4
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm_jax.evaluate.paper import AVG_5, PaperRow
from fastvlm_jax.evaluate.standard_error import WIDTH

TITLE = 34  # characters of a benchmark's title on a terminal


@dataclasses.dataclass(frozen=True)
class Table:
    """Holds a table of texts.

    Attributes:
      header: name of each column.
      rows: cells of each row.
      notes: lines that explain it.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Returns the table for a terminal: aligned columns, numbers to the right."""
        lines = [self.header, *self.rows]
        lines = [(short(first, TITLE), *rest) for first, *rest in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (self.header[0], "protocol")
        cells = [
            "  ".join(
                cell.ljust(width) if name in left else cell.rjust(width)
                for cell, width, name in zip(line, widths, self.header, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([cells[0], "-" * len(cells[0]), *cells[1:], "", *self.notes]).rstrip("\n")

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        escaped = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([*escaped, "", *(f"- {note.removeprefix('* ')}" for note in self.notes)]).rstrip("\n")


def make_table(summaries: Sequence[Mapping[str, Any]], paper: Sequence[PaperRow], in_domain: Sequence[str]) -> Table:
    """Returns the table of a model's summaries, with its Avg-5.

    Args:
      summaries: of benchmarks, from `results.summarise`.
      paper: the paper's rows of the same model; a column each.
      in_domain: names of the benchmarks whose training splits are in the paper's training mixes.
    """
    rows = [_cells(summary, paper, in_domain) for summary in summaries]
    mean, lacking = _avg_5(summaries)
    if not lacking:
        rows.append(("Avg-5", *mean, "", "", *(_figure(row.avg_5) for row in paper)))
    header = ("benchmark", "score", "95 %", "n", "protocol", *(row.data for row in paper))
    return Table(header, tuple(rows), tuple(_notes(summaries, paper, in_domain, lacking)))


def _cells(summary: Mapping[str, Any], paper: Sequence[PaperRow], in_domain: Sequence[str]) -> tuple[str, ...]:
    name, count, published = summary["benchmark"], summary["questions"], summary["questions_published"]
    title = short(summary["title"], TITLE - 2) + (" *" if name in in_domain else "")
    score = "not scored" if summary["score"] is None else f"{summary['score']:.1f}"
    questions = f"{count:,}" if count >= published else f"{count:,} of {published:,}"
    figures = (_figure(row.figures.get(name)) for row in paper)
    return (title, score, _half_width(summary["standard_error"]), questions, summary["protocol"]["name"], *figures)


def _avg_5(summaries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], list[str]]:
    """Returns (mean, half width of its interval) as texts, and the benchmarks without a score."""
    first: dict[str, Mapping[str, Any]] = {}
    for summary in summaries:
        if summary["score"] is not None:
            first.setdefault(summary["benchmark"], summary)
    lacking = [name for name in AVG_5 if name not in first]
    if lacking:
        return ("", ""), lacking
    errors = [first[name]["standard_error"] for name in AVG_5]
    error = None if None in errors else math.hypot(*errors) / len(AVG_5)
    return (f"{sum(first[name]['score'] for name in AVG_5) / len(AVG_5):.1f}", _half_width(error)), []


def _notes(
    summaries: Sequence[Mapping[str, Any]], paper: Sequence[PaperRow], in_domain: Sequence[str], lacking: Sequence[str]
) -> list[str]:
    names = [summary["benchmark"] for summary in summaries]
    notes = []
    if set(names) & set(in_domain):
        notes.append("* in-domain: the paper's training mixes hold its training split")
    if paper:
        notes.append(f"right: the paper's {paper[0].model}, by millions of samples of pretraining + tuning")
    if any(row.data == "card" for row in paper):
        notes.append("card: the model card of the published model, which names no protocol")
    if paper and any(summary["protocol"]["name"] != "paper" for summary in summaries):
        notes.append("only scores of the protocol paper were made as the paper's were")
    if any(summary["questions"] < summary["questions_published"] for summary in summaries):
        notes.append("of: fewer questions were asked than are published")
    notes += [f"{summary['title']}: {summary['not_scored']}" for summary in summaries if summary["not_scored"]]
    if lacking and len(names) > 1 and set(names) & set(AVG_5):
        notes.append(f"Avg-5 needs {', '.join(AVG_5)}; without a score: {', '.join(lacking)}")
    return notes


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _half_width(error: float | None) -> str:
    return "" if error is None else f"± {WIDTH * error:.1f}"


def short(text: str, width: int) -> str:
    """Returns a text cut to a width, with "..." where something is left out."""
    return text if len(text) <= width else text[: width - 3] + "..."
