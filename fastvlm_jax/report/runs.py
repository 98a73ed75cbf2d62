"""Writes the HTML page about training runs: losses, scores, rates, lineage, differing settings, answered questions."""

import json
import math
import os
import pathlib
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from etils import epath

from fastvlm_jax import model_io
from fastvlm_jax.data.sources import read_manifest, read_shards
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import qa
from fastvlm_jax.evaluate.records import rows_of
from fastvlm_jax.evaluate.run import score
from fastvlm_jax.files import write_whole
from fastvlm_jax.images.decode import decode
from fastvlm_jax.report.answers import plot_answers, read_answers
from fastvlm_jax.report.curves import Run, named, plot_losses, plot_rates, plt, read_runs
from fastvlm_jax.report.page import Picture, Table, Texts, render
from fastvlm_jax.workdir import origin

NUM_SAMPLES = 16
MAX_TOKENS = 16  # longest answer on the sheet
# Rates of a run: the metric, how the table names it, and what of its logs stands there.
RATES = {
    "step_seconds": ("seconds a step", statistics.median),
    "images/s": ("images/s", statistics.median),
    "tokens/s": ("tokens/s", statistics.median),
    "mfu": ("MFU", statistics.median),
    "mfu/vision": ("MFU vision", statistics.median),
    "mfu/llm": ("MFU LLM", statistics.median),
    "mfu/text": ("MFU text tower", statistics.median),
    "input_bound": ("share of waiting for input", statistics.median),
    "hbm_peak_gb": ("most memory, GB", max),
}


def write_report(
    workdirs: Sequence[pathlib.Path], output: pathlib.Path, model: str | None = None, data: str | None = None
) -> list[pathlib.Path]:
    """Writes the page and, beside it, its pictures `*_loss.png`, `*_rates.png` if the runs have rates, `*_answers.png`
    of a run that asked sample questions (of several runs `*_answers_1.png` ...) and, with `model` and `data`,
    `*_samples.png`; returns their paths.

    Raises:
      ValueError: a folder is no workdir, is named twice or has no metrics yet; or `model` is given without `data`.
    """
    if (model is None) != (data is None):
        raise ValueError("--model and --data belong together: the sheet of samples needs both")
    runs = read_runs(workdirs)
    split = "" if data is None else held_out(data)
    answered = [] if model is None else answer_samples(model, data, split)
    output.parent.mkdir(parents=True, exist_ok=True)

    def beside(name: str) -> pathlib.Path:
        return output.with_name(f"{output.stem}_{name}.png")

    plot_losses(runs, beside("loss"))
    pictures = [Picture("Loss", beside("loss").name)]
    if plot_rates(runs, beside("rates")):
        told = "Pairs told apart, and rates" if any(run.points("logit_scale") for run in runs) else "Rates"
        pictures.append(Picture(told, beside("rates").name))
    for number, (run, workdir) in enumerate(zip(runs, workdirs, strict=True), 1):
        if answers := read_answers(workdir):
            sheet = beside(f"answers_{number}" if len(runs) > 1 else "answers")
            plot_answers(workdir, answers, sheet)
            pictures.append(Picture(f"Answers of {run.name} to its sample questions", sheet.name))
    if model is not None:
        plot_samples(answered, beside("samples"), split)
        title = f"Images of the split {split}: question, answer, truth"
        pictures.append(Picture(title, beside("samples").name))
    settings = Texts("All settings", [(run.name, json.dumps(run.config, indent=1)) for run in runs])
    tables = [results(runs), validation(runs), rates(runs), stages(runs), lineage(runs), differing(runs)]
    title = (" → " if any(run.start for run in runs) else ", ").join(run.name for run in runs)
    write_whole(output, render(title, [tables[0], *pictures, *tables[1:], settings]).encode())
    return [output, *(output.with_name(picture.file) for picture in pictures)]


def results(runs: Sequence[Run]) -> Table:
    """Returns the table of what each run reached; a metric that no run has gets no column."""
    keys = {"loss": "last loss", "validation/loss": "validation loss"}
    keys |= {"top1_images": "images that find their caption", "logit_scale": "factor of the logits"}
    keys |= {name: named(name) for run in runs for name in run.scores()}
    keys = {key: name for key, name in keys.items() if any(run.last(key) is not None for run in runs)}
    rows = [[run.name, run.rows[-1]["step"], f"{run.last('seconds'):.0f}"] for run in runs]
    for run, row in zip(runs, rows, strict=True):
        row += [with_error(run, key) for key in keys]
    return Table("Results", ["run", "steps", "seconds", *keys.values()], rows)


def with_error(run: Run, key: str) -> str:
    """Formats the last value of a metric, a score with its standard error: "71.23 ± 1.1"."""
    error = run.last(f"{key}_stderr")
    return written(run.last(key)) + ("" if error is None else f" ± {error:.2g}")


def validation(runs: Sequence[Run]) -> Table:
    """Returns the table of each run's validation loss and scores: the best, the step where it was, and the last."""
    rows = []
    for run in runs:
        for key in ("validation/loss", *run.scores()):
            found = [(row[key], row["step"]) for row in run.rows if key in row]
            if found:
                best, step = min(found) if key.endswith("/loss") else max(found, key=lambda each: each[0])
                rows.append([run.name, named(key), written(best), step, written(found[-1][0])])
    return Table("Validation", ["run", "metric", "best", "at step", "last"], rows)


def rates(runs: Sequence[Run]) -> Table:
    """Returns the table of each run's rates: the median of its logs, without the first, which holds the compilation."""
    keys = [key for key in RATES if any(run.points(key) for run in runs)]
    rows = []
    for run in runs:
        cells = []
        for key in keys:
            values = [value for _, value in run.points(key)]
            cells.append(written(RATES[key][1](values[1:] or values) if values else None))
        rows.append([run.name, *cells])
    return Table("Rates (medians)", ["run", *(RATES[key][0] for key in keys)], rows if keys else [])


def stages(runs: Sequence[Run]) -> Table:
    """Returns the table of what each stage learns, at which rate, from images of which size."""
    rows = []
    for run in runs:
        data = run.config.get("data", {})
        learns = [f"{pattern} at {rate:g}" for pattern, rate, *_ in run.config.get("groups", []) if rate]
        sizes = [str(size) for size, *_ in data.get("resolutions", [])] or [str(data.get("image_size", "-"))]
        grids = [f"{high}x{wide} tiles" for high, wide in data.get("grids", [])]
        images = data.get("groups", 0) * data.get("images_per_group", 0)
        cells = [", ".join(learns), ", ".join(sizes + grids), images]
        rows.append([run.name, run.config["stage"], *(cell or "-" for cell in cells)])
    return Table("Stages", ["run", "stage", "learns, peak rate", "image, px", "image slots a step"], rows)


def lineage(runs: Sequence[Run]) -> Table:
    """Returns the table of where each run's weights and data come from, and of the versions that trained it."""
    rows = []
    for run in runs:
        own, data = run.lineage, run.config.get("data", {})
        names = [data["path"]] if data.get("path") else [name for name, _ in data.get("mixture", [])]
        records = sum(sum(each["records"].values()) for each in own.get("data_sets", []))
        cells = [origin(own["parent"]), ", ".join(names), f"{records:,}" if records else ""]
        cells += [str(own.get("data_fingerprint", ""))[:16], own.get("code"), own.get("jax")]
        rows.append([run.name, *(cell or "-" for cell in cells)])
    head = ["run", "began from", "data", "records", "fingerprint of the data", "fastvlm_jax", "jax"]
    return Table("Lineage", head, rows)


def differing(runs: Sequence[Run]) -> Table:
    """Returns the table of the config keys in which the runs differ, a column for each run."""
    flat = [dict(flattened(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for own in flat for key in own))
    rows = [[key, *(own.get(key, "-") for own in flat)] for key in keys]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return Table("Settings that differ", ["key", *(run.name for run in runs)], rows)


def flattened(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the (dotted key, value) of all settings."""
    found = []
    for key, value in config.items():
        found += flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def written(value: float | None) -> str:
    """Formats a figure with four digits, a missing one as "-"."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def held_out(data: str | os.PathLike) -> str:
    """Returns the split whose questions are shown: "test" or, in a data set without one, "validation".

    Raises:
      FileNotFoundError, ValueError: there is no data set, or it has neither split.
    """
    splits = read_manifest(epath.Path(data).expanduser())["splits"]
    found = [split for split in ("test", "validation") if splits.get(split, {}).get("records")]
    if splits and not found:
        raise ValueError(f"{data} has neither a split test nor validation, whose questions the sheet shows")
    return found[0] if found else "test"


def answer_samples(model: str | os.PathLike, data: str | os.PathLike, split: str) -> list[Result]:
    """Answers one question about each of a split's first NUM_SAMPLES images, another kind of question each time.

    Records without an image, and those that the model cannot be asked about, are left out of the sheet.
    """
    records = read_shards(data, split)
    few = [records[i] for i in range(min(NUM_SAMPLES, len(records)))]
    rows = [row for row in rows_of(few, "separate") if row.pictures]
    if not rows:
        return []
    own = qa.benchmark(split, "separate")
    by_record: dict[str, list[Result]] = {}
    for result in score(*model_io.load(model), own, own.protocols[0], rows, max_tokens=MAX_TOKENS).results:
        by_record.setdefault(result.row.fields["record"], []).append(result)
    return [found[(5 * i) % len(found)] for i, found in enumerate(by_record.values())]


def plot_samples(results: Sequence[Result], path: pathlib.Path, split: str) -> None:
    """Draws a sheet of images with question and answer; a wrong answer is red, with the true one beside it."""
    rows = max(math.ceil(min(len(results), 16) / 4), 1)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.5 * rows + 1.5))
    for axis in axes.flat:
        axis.axis("off")
    for axis, result in zip(axes.flat, results, strict=False):
        axis.imshow(decode(result.row.pictures[0].read()), interpolation="nearest")
        right, truth = result.mark.score == 1, result.row.references[0]
        given = textwrap.shorten(result.answer, 24, placeholder="...") or "(nothing)"
        words = given if right else f"{given}  (truth: {truth})"
        question = textwrap.shorten(result.row.question, 44, placeholder="...")
        axis.set_title(question, fontsize=8.5, parse_math=False)
        axis.text(
            0.5, -0.04, words, transform=axis.transAxes, ha="center", va="top", fontsize=11,
            color="#116622" if right else "#bb1111", weight="bold", parse_math=False,
        )  # fmt: skip
    figure.suptitle(f"images of the split {split}: question above, answer below (green = right)", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=100)
    plt.close(figure)
