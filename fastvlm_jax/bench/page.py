"""Writes what a benchmark found: a table in markdown, and a picture of stacked bars, beside its JSON file."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastvlm_jax import files

PICTURES = (".svg", ".png")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in markdown, its first column flush left and the others flush right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float | None) -> str:
    """Returns seconds as milliseconds with three digits, as 0.00512, 5.12, 51.2 or 5,120; "-" for None."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_beside(path: pathlib.Path, text: str, bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Writes FILE.md, FILE.svg and FILE.png beside FILE.json: the text, and the bars as `draw_bars` draws them."""
    files.write_whole(path.with_suffix(".md"), f"{text.rstrip()}\n".encode())
    draw_bars(path, bars, title)


def draw_bars(path: pathlib.Path, bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draws bars of stacked parts, in milliseconds (paper, Figure 5), to FILE.svg and FILE.png.

    Args:
      path: file whose suffix is replaced.
      bars: seconds of each part, by name of the bar; a part has one colour in all bars, in the order of the first bars.
      title: what was timed, where, and whether it was measured or estimated.
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    figure, axis = plt.subplots(figsize=(max(6.0, 1.6 + 1.1 * len(bars)), 4.4), layout="constrained")
    places, below = range(len(bars)), [0.0] * len(bars)
    for part in parts:
        heights = [1000 * bar.get(part, 0.0) for bar in bars.values()]
        axis.bar(places, heights, 0.62, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for place, total in zip(places, below, strict=True):
        axis.annotate(milliseconds(total / 1000), (place, total), (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(places, list(bars))
    axis.set_ylabel("ms")
    axis.set_ylim(0, 1.1 * max(below, default=1.0) or 1.0)
    axis.set_title(title, fontsize=10, loc="left", wrap=True)
    axis.spines[["top", "right"]].set_visible(False)
    entries = (found[::-1] for found in axis.get_legend_handles_labels())
    figure.legend(*entries, loc="outside right center", frameon=False)  # beside the bars, never on them
    for suffix in PICTURES:
        with files.whole_file(path.with_suffix(suffix)) as file:
            figure.savefig(file, format=suffix[1:], dpi=150)
    plt.close(figure)
