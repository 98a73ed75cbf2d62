"""Writes the page of a sweep: its figures, "N times faster at equal accuracy", and a table of all points."""

import io
import pathlib
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from fastvlm_jax import files
from fastvlm_jax.bench import paper_ttft
from fastvlm_jax.bench.page import milliseconds
from fastvlm_jax.report import sweep_figures as figures
from fastvlm_jax.report.faster import Comparison, compare
from fastvlm_jax.report.page import Picture, Table, inline_svg, render
from fastvlm_jax.report.sweep_figures import PAPER_TTFT, TOKENS, USER_TTFT, Cost
from fastvlm_jax.report.sweep_results import Point, Sweep, read_sweep

# Drawings as text, and the same bytes for the same figures.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "fastvlm_jax"}


def write_sweep_report(folder: pathlib.Path, output: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Writes the page of a sweep and, beside it, its figures as PNG and SVG.

    Returns:
      The paths of the files, and what the page says in words: what is not drawn, and who is faster.

    Raises:
      ValueError: the folder holds no results yet, or they are wrong; see `read_sweep`.
    """
    sweep = read_sweep(folder)
    drawn, written, pictures = draw(sweep), [output], []
    output.parent.mkdir(parents=True, exist_ok=True)
    tips = {f"point-{i}": tip(sweep, point) for i, point in enumerate(sweep.points)}
    for name, (figure, title, note) in drawn.items():
        own = [output.with_name(f"{output.stem}_{name}{suffix}") for suffix in (".svg", ".png")]
        svg = save(figure, *own)
        pictures.append(Picture(title, svg=inline_svg(svg, name, tips, title), note=note))
        written += own
    faster = compare(sweep.points, PAPER_TTFT)
    told = [*left_out(sweep), *(pair[0].sentence(f"paper_ttft, {sweep.clock}") for pair in faster)]
    parts = [*pictures[:1], comparisons(sweep, faster), points_table(sweep), *pictures[1:], parts_table(sweep)]
    about = [f"Time {sweep.clock}. {sweep.machine}".strip(), "± is the standard error."]
    files.write_whole(output, render(sweep.title, parts, lead=told, soft=about).encode())
    return written, told


def draw(sweep: Sweep) -> dict[str, tuple[Figure, str, str]]:
    """Returns the figures for which the sweep has points, as name -> (figure, title, note)."""
    drawn = {}

    def add(name: str, cost: Cost, title: str, note: str, points: Sequence[Point] = sweep.points, **by) -> None:
        if figures.series_of(points, cost):
            drawn[name] = (figures.accuracy_figure(sweep, cost, points=points, **by), title, note)

    step = "The staircase is the Pareto front: at an accuracy, the cheapest model that reaches it."
    marks = f"{step} The area of a marker grows with the encoder; beside it stands the side of the image in pixels."
    waits = "From the image file to the first token, with decoding, resizing, copy, projector and the prompt's text."
    if sweep.paper_figure == "1a":
        marks += (
            f" Grey: the paper's Figure 1a ({paper_ttft.MACHINE}), digitised from its picture to about 2 ms and 0.1 "
            "points."
        )
    add("ttft", PAPER_TTFT, "Accuracy over time to first token, as the paper counts it (paper_ttft)", marks)
    add("user_ttft", USER_TTFT, "Accuracy over time to first token, as a user waits (user_ttft)", waits)
    with_tiles = {point.encoder for point in sweep.points if point.grid}
    tiled = [point for point in sweep.points if point.encoder in with_tiles]
    add("tiles", PAPER_TTFT, "One image against tiles", step, tiled, by=figures.layout_of)
    add("tokens", TOKENS, "Accuracy over image tokens", step)
    timed = [point for point in sweep.points if point.times and "encoder" in point.times.parts]
    if any(point.grid is None for point in timed):
        grey = f"Grey: the paper's Table 10 ({paper_ttft.MACHINE})." if sweep.paper_figure else ""
        drawn["encoder"] = (figures.latency_figure(sweep), "Latency of the encoder over resolution", grey)
    if any(point.times.paper is not None for point in timed):
        drawn["parts"] = (figures.parts_figure(sweep), "Encoder and prefill of the image tokens", "")
    return drawn


def save(figure: Figure, svg: pathlib.Path, png: pathlib.Path) -> str:
    """Writes a figure in both formats and returns the SVG."""
    text, picture = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(text, format="svg", metadata={"Date": None})
    figure.savefig(picture, format="png", dpi=150)
    files.write_whole(svg, text.getvalue())
    files.write_whole(png, picture.getvalue())
    return text.getvalue().decode()


def left_out(sweep: Sweep) -> list[str]:
    """Returns a sentence about each point that failed, is pending, or has no place in some figure."""
    told = []
    for point in sweep.points:
        found = {"accuracy": point.mean, "time to first token": point.times}
        lacks = [name for name, value in found.items() if value is None]
        words = {"failed": ["failed"], "pending": ["is pending"], "done": []}[point.state]
        words += [f"has no {lacks[0]}" if len(lacks) == 1 else "is not drawn"] * bool(lacks)
        if words:
            told.append(f"{point.name} {' and '.join(words)}" + (f": {point.error}" if point.error else ""))
    return told


def tip(sweep: Sweep, point: Point) -> str:
    """Returns the values of a point, a line each, for the page to show beside it."""
    lines = [
        point.name,
        f"{point.encoder}, {point.llm}",
        f"{point.size} px, {point.image_tokens:,} image tokens",
        f"{sweep.accuracy}: {with_error(point.mean, point.mean_standard_error)} %",
    ]
    if point.blind is not None:
        lines.append(f"blind: {point.blind:.1f} %")
    for name, cost in (("paper_ttft", PAPER_TTFT), ("user_ttft", USER_TTFT)):
        if (value := cost.of(point)) is not None:
            lines.append(f"{name}: {milliseconds(value / 1000)} ms ({sweep.kind})")
    return "\n".join(lines)


def comparisons(sweep: Sweep, pairs: Sequence[Sequence[Comparison]]) -> Table:
    """Returns the table of who is how many times faster at which accuracy."""
    rows = []
    for pair in pairs:
        for each in pair:
            cells = [f"{each.accuracy:.1f}", f"{each.times:.2f}"]
            for _, point, cost in (each.fast, each.slow):
                reached = with_error(point.mean, point.mean_standard_error)
                cells += [point.name, reached, milliseconds(cost / 1000)]
            rows.append(cells)
    side = ("its %", f"its ms ({sweep.kind})")
    head = [f"{sweep.accuracy}, % or more", "times faster", "faster", *side, "slower", *side]
    note = (
        "For each accuracy of a point, the cheapest points of both encoders that reach it, by paper_ttft. Nothing is "
        "interpolated: between two points there is no model."
    )
    return Table("Times faster at equal accuracy", head, rows, note)


def points_table(sweep: Sweep) -> Table:
    """Returns the table of all points: accuracy with standard errors, tokens, times, size and training."""
    several = [name for name in sweep.benchmarks if len(sweep.benchmarks) > 1]
    head = ["point", "state", "encoder", "LLM", "px", "image tokens", f"{sweep.accuracy}, %", *several, "blind, %"]
    head += [f"{name}, ms ({sweep.kind})" for name in ("paper_ttft", "user_ttft")]
    head += ["encoder, M parameters", "training, minutes"]
    rows = []
    for point in sweep.points:
        row = [point.name, point.state, point.encoder, point.llm, point.size, f"{point.image_tokens:,}"]
        row.append(with_error(point.mean, point.mean_standard_error))
        scores = [point.scores.get(name) for name in several]
        row += [with_error(score.value, score.standard_error) if score else "-" for score in scores]
        row.append("-" if point.blind is None else f"{point.blind:.1f}")
        times = (point.times.paper, point.times.user) if point.times else (None, None)
        row += map(milliseconds, times)
        row.append(f"{point.vision_parameters / 1e6:.1f}" if point.vision_parameters else "-")
        row.append("-" if point.train_seconds is None else f"{point.train_seconds / 60:.1f}")
        rows.append(row)
    note = "" if all(point.blind is None for point in sweep.points) else "Blind: the same questions about other images."
    return Table("Points", head, rows, note)


def parts_table(sweep: Sweep) -> Table:
    """Returns the table of the parts of each point's time to first token."""
    names = list(dict.fromkeys(name for point in sweep.points if point.times for name in point.times.parts))
    rows = [
        [point.name, *(milliseconds(own.get(name)) for name in names)]
        for point in sweep.points
        if point.times and (own := point.times.parts)
    ]
    setting = sweep.setting
    note = (
        f"Medians; batch {setting.get('batch')}, {setting.get('dtype')}, {setting.get('prompt_tokens')} prompt tokens."
    )
    return Table(f"Parts of the time, ms ({sweep.kind})", ["point", *names], rows, note)


def with_error(value: float | None, error: float | None) -> str:
    """Formats a score with its standard error: "71.2 ± 1.1"."""
    if value is None:
        return "-"
    return f"{value:.1f}" + ("" if error is None else f" ± {error:.2g}")
