"""Draws a run on one HTML page: the loss curves of its stages and a sheet of answered test questions."""

import os
import pathlib
import textwrap
from collections.abc import Sequence

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastvlm_jax import model_io
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.evaluate.answers import Result, answer_records
from fastvlm_jax.images.decode import decode
from fastvlm_jax.metrics.writer import read_metrics
from fastvlm_jax.workdir import read_run

NUM_SAMPLES = 16
PAGE = jinja2.Template(
    """<!doctype html>
<meta charset="utf-8"><title>fastvlm_jax: {{ title }}</title>
<style>
 body { font: 15px system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222 }
 img { max-width: 100% } td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd }
</style>
<h1>{{ title }}</h1>
<table>
 <tr><th>stage<th>steps<th>seconds<th>last loss<th>validation loss<th>validation accuracy</tr>
{%- for row in rows %}
 <tr><td>{{ row.stage }}<td>{{ row.steps }}<td>{{ "%.0f" % row.seconds }}<td>{{ row.loss }}<td>{{ row.validation_loss }}
 <td>{{ row.accuracy }}</tr>
{%- endfor %}
</table>
{%- for picture in pictures %}
<h2>{{ picture.title }}</h2><img src="{{ picture.file }}" alt="{{ picture.title }}">
{%- endfor %}
""",
    autoescape=True,
)


def write_report(
    workdirs: Sequence[pathlib.Path], output: pathlib.Path, model: str | None = None, data: str | None = None
) -> list[pathlib.Path]:
    """Writes the page and its pictures `*_loss.png` and, with `model` and `data`, `*_samples.png` beside it.

    Raises:
      ValueError: a folder is no workdir or has no metrics yet, or `model` is given without `data`.
    """
    if (model is None) != (data is None):
        raise ValueError("--model and --data belong together: the sheet of samples needs both")
    stages = []
    for workdir in workdirs:
        rows = read_metrics(workdir)
        if not rows:
            raise ValueError(f"{workdir} has no metrics.jsonl: name the workdir of a training run")
        stages.append((read_run(workdir)["config"]["stage"] or workdir.name, rows))
    output.parent.mkdir(parents=True, exist_ok=True)
    loss = output.with_name(output.stem + "_loss.png")
    plot_losses(stages, loss)
    written, pictures = [output, loss], [{"title": "Loss", "file": loss.name}]
    if model is not None:
        sheet = output.with_name(output.stem + "_samples.png")
        plot_samples(answer_samples(model, data), sheet)
        written.append(sheet)
        pictures.append({"title": "Test images: question, answer, truth", "file": sheet.name})
    page = PAGE.render(
        title=" → ".join(name for name, _ in stages), rows=[table_row(*s) for s in stages], pictures=pictures
    )
    output.write_text(page)
    return written


def table_row(stage: str, rows: Sequence[dict[str, float]]) -> dict[str, object]:
    """Returns the row of a stage in the table."""

    def last(key: str) -> str:
        values = [row[key] for row in rows if key in row]
        return f"{values[-1]:.4g}" if values else "-"

    return {
        "stage": stage,
        "steps": rows[-1]["step"],
        "seconds": rows[-1]["seconds"],
        "loss": last("loss"),
        "validation_loss": last("validation/loss"),
        "accuracy": last("validation/accuracy"),
    }


def plot_losses(stages: Sequence[tuple[str, Sequence[dict[str, float]]]], path: pathlib.Path) -> None:
    """Draws training loss, validation loss and validation accuracy over the steps of all stages in a row."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    accuracy_axis, start = axis.twinx(), 0
    for i, (name, rows) in enumerate(stages):
        colour = f"C{i}"
        for key, style, label in (("loss", "-", name), ("validation/loss", "o--", None)):
            points = [(start + row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5)
        key = "validation/accuracy"
        points = [(start + row["step"], 100 * row[key]) for row in rows if key in row]
        if points:
            accuracy_axis.plot(*zip(*points, strict=True), "s:", color="0.35", markersize=5)
        start += rows[-1]["step"]
        axis.axvline(start, color="0.85", linewidth=1)
    axis.plot([], [], "o--", color="0.2", label="validation loss")
    axis.plot([], [], "s:", color="0.35", label="validation accuracy (right)")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    accuracy_axis.set(ylabel="validation accuracy, %", ylim=(0, 101))
    axis.spines["top"].set_visible(False)
    accuracy_axis.spines["top"].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    entries = axis.get_legend_handles_labels()
    figure.legend(*entries, loc="upper center", ncol=len(stages) + 2, frameon=False, fontsize=9, columnspacing=1.2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def answer_samples(model: str | os.PathLike, data: str | os.PathLike) -> list[Result]:
    """Answers one question about each of the first NUM_SAMPLES test images, another kind of question each time."""
    vlm, variables, processor = model_io.load(model)
    records = read_shards(data, "test")
    few = [records[i] for i in range(min(NUM_SAMPLES, len(records)))]
    results = answer_records(vlm, variables, processor, few)
    by_image: dict[str, list[Result]] = {}
    for result in results:
        by_image.setdefault(result.key, []).append(result)
    return [found[(5 * i) % len(found)] for i, found in enumerate(by_image.values())]


def plot_samples(results: Sequence[Result], path: pathlib.Path) -> None:
    """Draws a sheet of images with question and answer; a wrong answer is red, with the true one beside it."""
    figure, axes = plt.subplots(4, 4, figsize=(11, 11.5))
    for axis in axes.flat:
        axis.axis("off")
    for axis, result in zip(axes.flat, results, strict=False):
        axis.imshow(decode(result.image), interpolation="nearest")
        right = result.answer == result.truth
        given = textwrap.shorten(result.answer, 24, placeholder="...") or "(nothing)"
        words = given if right else f"{given}  (truth: {result.truth})"
        axis.set_title(result.question, fontsize=8.5)
        axis.text(
            0.5, -0.04, words, transform=axis.transAxes, ha="center", va="top", fontsize=11,
            color="#116622" if right else "#bb1111", weight="bold",
        )  # fmt: skip
    figure.suptitle("easy-VQA test images: question above, answer below (green = right)", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=100)
    plt.close(figure)
