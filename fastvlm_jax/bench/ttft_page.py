"""Formats what `fastvlm bench ttft` found: tables for the terminal and for markdown, and the bars of its picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm_jax import files
from fastvlm_jax.bench.first_token import Question
from fastvlm_jax.bench.page import markdown_table, milliseconds, write_beside
from fastvlm_jax.bench.paper_ttft import MACHINE, PREFILL_MS, TILES_MS, VISION_MS

Point = Mapping[str, Any]
# Part -> its column.
COLUMNS = {
    "decode_resize": "decode, resize", "copy": "copy", "encoder": "encoder", "projector": "projector",
    "prefill": "prefill", "fused": "fused", "next_token": "next token", "prefill_image": "prefill of the image",
}  # fmt: skip
STACKED = ("decode_resize", "copy", "encoder", "projector", "prefill")


def write(path: pathlib.Path, found: Mapping[str, Sequence[Point]]) -> None:
    """Writes FILE.json, and beside it the tables as FILE.md and the picture as FILE.svg and FILE.png."""
    files.write_json(path, found)
    write_beside(path, text(found), bars(found), title(found["points"][0]))


def resolution(point: Point) -> str:
    """Returns the resolution of a point as --image_size writes it."""
    return Question(point["image_size"], point["grid"]).name


def of_paper(point: Point) -> tuple[float | None, float | None]:
    """Returns the paper's (encoder, prefill of the image tokens) for a point, in seconds; None what it does not print.

    The paper's model is whole, with batch 1 (Table 10).
    """
    if point["batch"] != 1:
        return None, None
    size, tokens = (point["encoder"], point["image_size"]), point["image_tokens"]
    vision = TILES_MS.get((*size, tuple(point["grid"]))) if point["grid"] else VISION_MS.get(size)
    prefill = PREFILL_MS.get((point["llm"], tokens))
    return tuple(None if ms is None else ms / 1000 for ms in (vision, prefill))


def text(found: Mapping[str, Sequence[Point]]) -> str:
    """Returns all tables in markdown, with a line about the machine; times are medians in milliseconds."""
    points, against = found["points"], found["against"]
    blocks = [about(points), parts_table(points), sums_table(points)]
    if against:
        blocks.append(against_table(against))
    return "\n\n".join(blocks)


def about(points: Sequence[Point]) -> str:
    """Returns what the points of a machine and model have in common, and their numbers of runs, in one line."""
    point, fewest, most = points[0], *(pick(point["runs"] for point in points) for pick in (min, max))
    runs = f"{fewest} to {most}" if fewest < most else f"{most}"
    counts = " + ".join(f"{count / 1e6:,.1f}M {part}" for part, count in point["parameters"].items())
    how = f"measured, medians of {runs} runs" if point["measured"] else "ESTIMATED by the TPU compiler"
    return (
        f"{point['encoder']} and {point['llm']} ({counts}) in {point['dtype']} on {point['device']}: {how}, ms. "
        f"{point['prompt_tokens']} tokens of text, {point['batch']} prompt{'s' * (point['batch'] > 1)}."
    )


def parts_table(points: Sequence[Point]) -> str:
    """Returns a row a point, with the median of each part; p10 and p90 of the fused run."""
    names = [name for name in COLUMNS if any(name in point["parts"] for point in points)]
    header = ["image", "tokens", *(COLUMNS[name] for name in names), "compile, s", "peak, GB", "attention"]
    rows = []
    for point in points:
        cells = [_cell(point["parts"].get(name), name == "fused" and point["measured"]) for name in names]
        compiled = f"{sum(point['compile_seconds'].values()):,.0f}"
        rows.append(
            [
                resolution(point),
                f"{point['image_tokens']:,}",
                *cells,
                compiled,
                f"{point['peak_bytes'] / 1e9:.2f}",
                point["attention"],
            ]
        )
    return markdown_table(header, rows)


def _cell(part: Mapping[str, float] | None, whole: bool) -> str:
    if part is None:
        return "-"
    found = milliseconds(part["median"])
    return f"{found} ({milliseconds(part['p10'])} to {milliseconds(part['p90'])})" if whole else found


def sums_table(points: Sequence[Point]) -> str:
    """Returns the two times to the first token of each point, and the paper's Table 10 beside its own kind."""
    header = ["image", "user TTFT", "paper TTFT = encoder + prefill of the image tokens", f"the paper's, {MACHINE}"]
    rows = [[resolution(point), milliseconds(point["user_ttft"]), paper_sum(point), printed(point)] for point in points]
    return markdown_table(header, rows)


def paper_sum(point: Point) -> str:
    """Returns the paper's kind of time of a point, with its two parts: "34.2 = 29.8 + 4.34"."""
    parts = [milliseconds(point["parts"][name]["median"]) for name in ("encoder", "prefill_image")]
    return f"{milliseconds(point['paper_ttft'])} = {' + '.join(parts)}"


def printed(point: Point) -> str:
    """Returns what the paper prints for a point in the same form, "-" where it prints nothing."""
    theirs = of_paper(point)
    if theirs == (None, None):
        return "-"
    parts = " + ".join(map(milliseconds, theirs))
    return parts if None in theirs else f"{milliseconds(sum(theirs))} = {parts}"


def against_table(against: Sequence[Point]) -> str:
    """Returns the medians of other implementations, and in brackets the ratio of this package's medians to them."""
    names = [name for name in COLUMNS if any(name in row["parts"] for row in against)]
    rows = [
        [f"{row['name']}, {resolution(row)}"]
        + [f"{milliseconds(row['parts'][name]['median'])} ({row['ratios'][name]:.2f})" for name in names]
        for row in against
    ]
    header = ["ms (this package's time over it)", *(COLUMNS[name] for name in names)]
    return markdown_table(header, rows)


def bars(found: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, float]]:
    """Returns the bars of the picture: the parts of each point, stacked, as far as they were timed."""
    return {
        resolution(point): {COLUMNS[name]: point["parts"][name]["median"] for name in STACKED if name in point["parts"]}
        for point in found["points"]
    }


def title(point: Point) -> str:
    """Returns the title of the picture."""
    how = "measured" if point["measured"] else "ESTIMATED by the TPU compiler, nothing ran on a TPU"
    model = f"{point['encoder']}, {point['llm']}, {point['dtype']}"
    return f"Time to the first token by parts: {model}\n{point['device']}: {how}"
