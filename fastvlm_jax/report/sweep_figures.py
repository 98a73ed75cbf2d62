"""Draws the figures of a sweep, as the paper draws its Figures 1, 3, 4, 5 and 6.

Accuracy stands over a cost: a time to first token, or the image tokens. A front is drawn as a staircase, since a line
between two models would claim a model that nobody trained.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from fastvlm_jax.bench import paper_ttft
from fastvlm_jax.bench.pareto import front
from fastvlm_jax.evaluate.paper import NAMES
from fastvlm_jax.report.labels import place_labels
from fastvlm_jax.report.sweep_results import Point, Sweep

# Okabe and Ito's colours, which colour-blind people tell apart; each series has its own marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#555555", "#8C6D1F")
MARKERS = "osDv^Ph*"
GREY = "0.55"
LARGEST, SMALLEST = 190.0, 36.0  # areas of the markers of the largest encoder and of tiny ones, points²
WIDE = 25  # a cost whose largest value is so many times its smallest gets a logarithmic axis


@dataclasses.dataclass(frozen=True)
class Cost:
    """Describes what accuracy is drawn over.

    Attributes:
      of: returns the cost of a point, None if it has none.
      label: the axis's label.
      timed: whether it is a time, so that the drawing says where it comes from.
      paper: whether the paper's own points are on this axis.
    """

    of: Callable[[Point], float | None]
    label: str
    timed: bool = True
    paper: bool = False


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


PAPER_TTFT = Cost(
    lambda point: _milliseconds(point.times.paper) if point.times else None,
    "paper_ttft, ms: encoder and prefill of the image tokens",
    paper=True,
)
USER_TTFT = Cost(
    lambda point: _milliseconds(point.times.user) if point.times else None,
    "user_ttft, ms: from the image file to the first token",
)
TOKENS = Cost(lambda point: point.image_tokens, "image tokens that the language model reads", timed=False)


def encoder_of(point: Point) -> str:
    """Returns the series of a point: its encoder."""
    return point.encoder


def layout_of(point: Point) -> str:
    """Returns the series of a point: its encoder, and whether it sees one whole image or tiles."""
    return f"{point.encoder}, {'tiles' if point.grid else 'one image'}"


def series_of(
    points: Sequence[Point], cost: Cost, by: Callable[[Point], str] = encoder_of
) -> dict[str, list[tuple[float, float, Point]]]:
    """Returns the points that have both, as series -> (cost, accuracy in percent, point), in the order of the sweep."""
    found: dict[str, list[tuple[float, float, Point]]] = {}
    for point in points:
        value = cost.of(point)
        if value is not None and point.mean is not None:
            found.setdefault(by(point), []).append((value, point.mean, point))
    return found


def label_of(point: Point, points: Sequence[Point]) -> str:
    """Returns what is written beside a point: its size, and the key of its language model if the sweep has several."""
    several = len({each.llm for each in points}) > 1
    return f"{point.key[1]} {point.size}" if several else point.size


def accuracy_figure(
    sweep: Sweep, cost: Cost, by: Callable[[Point], str] = encoder_of, points: Sequence[Point] | None = None
) -> Figure:
    """Draws accuracy over a cost: a colour and marker and a front for each series, marker areas by encoder size.

    Bars are one standard error up and down. The paper's points are grey where the sweep repeats Figure 1a. The marker
    of points[i] has the id "point-i", i counted in the sweep.

    Args:
      by: series of a point.
      points: points to draw; by default all.
    """
    points = sweep.points if points is None else points
    series = series_of(points, cost, by)
    figure, axis = _figure()
    largest = max((point.vision_parameters for point in sweep.points), default=0)
    labels, handles = [], []
    for (name, own), colour, marker in zip(series.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        for x, y, point in own:
            area = max(LARGEST * point.vision_parameters / largest, SMALLEST) if largest else 60.0
            drawn = axis.scatter(
                [x], [y], area, color=colour, marker=marker, edgecolor="white", linewidth=0.8, zorder=4
            )
            drawn.set_gid(f"point-{sweep.points.index(point)}")
            if point.mean_standard_error is not None:
                axis.errorbar(x, y, point.mean_standard_error, color="0.15", capsize=2.5, linewidth=0.9, zorder=5)
            labels.append((x, y, label_of(point, sweep.points), colour, area))
        sizes = sorted({round(point.vision_parameters / 1e6, 1) for *_, point in own if point.vision_parameters})
        written = f"{name} ({' to '.join(f'{size:g}' for size in (sizes[:1] + sizes[1:][-1:]))} M)" if sizes else name
        handles.append(
            Line2D([], [], color=colour, marker=marker, markeredgecolor="white", markersize=8, label=written)
        )
    if cost.paper and sweep.paper_figure == "1a":
        labels += _draw_paper(axis)
        handles.append(Line2D([], [], color=GREY, marker="o", ls=":", label=f"the paper's ({paper_ttft.MACHINE})"))
    blind = [point.blind for point in points if point.mean is not None and point.blind is not None]
    if blind:
        axis.axhspan(min(blind), max(blind), color="0.85", zorder=0)
        axis.axhline(sum(blind) / len(blind), color="0.35", linewidth=1, linestyle=(0, (6, 3)), zorder=1, gid="blind")
        handles.append(Line2D([], [], color="0.35", linestyle=(0, (6, 3)), linewidth=1, label="blind baseline"))
    _limits(axis, [x for x, *_ in labels])
    for (_, own), colour in zip(series.items(), cycle(COLOURS), strict=False):
        _draw_front(axis, [(x, y) for x, y, _ in own], color=colour, alpha=0.75, linewidth=1.6)
    axis.set(
        xlabel=f"{cost.label} ({sweep.kind})" if cost.timed else cost.label,
        ylabel=f"{sweep.accuracy}, % (bars: ± 1 standard error)",
    )
    axis.yaxis.label.set_parse_math(False)
    _finish(figure, axis, sweep.title + (f"; time {sweep.clock}" if cost.timed else ""), handles)
    place_labels(axis, labels)
    return figure


def latency_figure(sweep: Sweep) -> Figure:
    """Draws the latency of each encoder over the side of the image, logarithmic (paper, Figure 3); without tiles.

    A size that was timed with several language models stands at the median of its times.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for point in sweep.points:
        if point.grid is None and point.times and "encoder" in point.times.parts:
            times = found.setdefault((point.key[0], point.encoder), {}).setdefault(point.image_size, [])
            times.append(1000 * point.times.parts["encoder"])
    figure, axis = _figure()
    handles = []
    for ((key, name), times), colour, marker in zip(found.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        sides = sorted(times)
        middle = [statistics.median(times[side]) for side in sides]
        handles += axis.plot(sides, middle, color=colour, marker=marker, label=name)
        if sweep.paper_figure:
            paper = sorted((side, ms) for (encoder, side), ms in paper_ttft.VISION_MS.items() if encoder == key)
            if paper:
                axis.plot(*zip(*paper, strict=True), ":", color=GREY, marker=marker, mfc="white", zorder=1)
    if len(axis.lines) > len(handles):
        handles.append(Line2D([], [], color=GREY, ls=":", label=f"the paper's ({paper_ttft.MACHINE})"))
    sides = sorted({side for times in found.values() for side in times})
    axis.set(yscale="log", xlabel="side of the image, pixels", ylabel=f"latency of the encoder, ms ({sweep.kind})")
    shown = sides[:1]
    for side in sides[1:]:
        if side - shown[-1] >= 0.07 * (sides[-1] - sides[0]):
            shown.append(side)
    axis.set_xticks(shown, [str(side) for side in shown])
    _plain_numbers(axis.yaxis)
    _finish(figure, axis, f"Latency of the encoder, {sweep.clock}", handles)
    return figure


def parts_figure(sweep: Sweep) -> Figure:
    """Draws encoder and prefill of the image tokens, stacked, for each resolution (paper, Figure 5).

    Each language model and encoder has a panel; the panels of a language model share their axis of time.
    """
    timed = [p for p in sweep.points if p.times and p.times.paper is not None and "encoder" in p.times.parts]
    rows = list(dict.fromkeys(point.llm for point in timed))
    columns = list(dict.fromkeys(point.encoder for point in timed))
    bars = max(sum((p.llm, p.encoder) == (row, column) for p in timed) for row in rows for column in columns)
    size = (max(5.2, 1.2 + len(columns) * max(2.0, 0.62 * bars)), 1.3 + 2.9 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), sharey="row", squeeze=False)
    for row, llm in zip(axes, rows, strict=True):
        for axis, encoder in zip(row, columns, strict=True):
            own = [point for point in timed if (point.llm, point.encoder) == (llm, encoder)]
            places, vision = range(len(own)), [1000 * point.times.parts["encoder"] for point in own]
            prefill = [1000 * point.times.paper - low for point, low in zip(own, vision, strict=True)]
            axis.bar(places, vision, 0.66, color=COLOURS[0], label="encoder")
            axis.bar(places, prefill, 0.66, bottom=vision, color=COLOURS[4], label="prefill of the image tokens")
            axis.set_xticks(places, [point.size.replace(" ", "\n") for point in own])
            axis.set_title(f"{encoder}, {llm}" if llm else encoder, fontsize=10, parse_math=False)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"ms ({sweep.kind})")
    for axis in axes[-1]:
        axis.set_xlabel("side of the image, pixels")
    figure.suptitle(f"Parts of paper_ttft, {sweep.clock}", fontsize=11, parse_math=False)
    handles, words = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], words[::-1], loc="outside lower center", ncol=2, frameon=False, fontsize=9)
    return figure


def _draw_front(axis: Axes, points: Sequence[tuple[float, float]], **style) -> None:
    """Draws the front as a staircase that goes on to the right edge of the axis, whose limits are set."""
    costs, values = [x for x, _ in points], [y for _, y in points]
    corners = [(costs[i], values[i]) for i in front(costs, values)]
    corners.append((axis.get_xlim()[1], corners[-1][1]))
    axis.plot(*zip(*corners, strict=True), drawstyle="steps-post", zorder=2, gid="front", **style)


def _draw_paper(axis: Axes) -> list[tuple[float, float, str, str, float]]:
    """Draws the digitised points of the paper's Figure 1a in grey; returns their labels."""
    labels, series = [], {}
    for encoder, side, ms, accuracy in paper_ttft.FIGURE_1A:
        series.setdefault(encoder, []).append((ms, accuracy))
        labels.append((ms, accuracy, f"{NAMES.get(encoder, encoder)} {side}", GREY, SMALLEST))
    for own in series.values():
        axis.plot(*zip(*own, strict=True), "o", color="none", markeredgecolor=GREY, markersize=5, zorder=1, gid="paper")
    return labels


def _limits(axis: Axes, xs: Sequence[float]) -> None:
    """Sets the axis of costs, from 0 or logarithmic where they lie far apart, and fixes that of accuracy."""
    axis.margins(y=0.1)
    axis.set_ylim(axis.get_ylim())
    low, high = min(xs), max(xs)
    if low > 0 and high > WIDE * low:
        axis.set(xscale="log", xlim=(low / 1.4, high * 1.4))
        _plain_numbers(axis.xaxis)
    else:
        axis.set_xlim(0, 1.12 * high)


def _plain_numbers(axis) -> None:
    """Writes the ticks of a logarithmic axis as numbers, at 1, 2 and 5 of each decade."""
    axis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0), numticks=12)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.6, 5.4))
    return figure, figure.add_subplot()


def _finish(figure: Figure, axis: Axes, title: str, handles: Sequence[Line2D]) -> None:
    figure.subplots_adjust(left=0.085, right=0.98, bottom=0.11, top=0.925 - 0.046 * -(-len(handles) // 3))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.92", zorder=0)
    axis.set_axisbelow(True)
    figure.text(0.015, 0.985, title, fontsize=11, weight="bold", va="top", parse_math=False)
    legend = figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.005, 0.955), ncol=3, frameon=False, fontsize=9,
        columnspacing=1.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
