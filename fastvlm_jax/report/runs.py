"""Writes one HTML page about training runs: losses, rates, settings that differ, and a sheet of answered questions."""

import json
import math
import os
import pathlib
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath

from fastvlm_jax import model_io
from fastvlm_jax.data.sources import read_manifest, read_shards
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import qa
from fastvlm_jax.evaluate.records import rows_of
from fastvlm_jax.evaluate.run import score
from fastvlm_jax.images.decode import decode
from fastvlm_jax.report.curves import Run, named, plot_losses, plt, read_runs

NUM_SAMPLES = 16
MAX_TOKENS = 16  # longest answer on the sheet
# Rates of a run: the metric, and how the table names it.
RATES = {"step_seconds": "seconds a step", "images/s": "images/s", "tokens/s": "tokens/s", "mfu": "MFU"}
PAGE = jinja2.Template(
    """<!doctype html>
<meta charset="utf-8"><title>fastvlm_jax: {{ title }}</title>
<style>
 body { font: 15px system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222 }
 table { border-collapse: collapse } img { max-width: 100% } pre { overflow-x: auto; font-size: 13px }
 td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
</style>
<h1>{{ title }}</h1>
{%- for table in tables %}
<h2>{{ table.title }}</h2>
<table>
 <tr>{% for name in table.head %}<th>{{ name }}{% endfor %}</tr>
{%- for row in table.rows %}
 <tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{%- endfor %}
</table>
{%- endfor %}
{%- for picture in pictures %}
<h2>{{ picture.title }}</h2><img src="{{ picture.file }}" alt="{{ picture.title }}">
{%- endfor %}
<h2>All settings</h2>
{%- for name, config in configs %}
<details><summary>{{ name }}</summary><pre>{{ config }}</pre></details>
{%- endfor %}
""",
    autoescape=True,
)


def write_report(
    workdirs: Sequence[pathlib.Path], output: pathlib.Path, model: str | None = None, data: str | None = None
) -> list[pathlib.Path]:
    """Writes the page and its pictures `*_loss.png` and, with `model` and `data`, `*_samples.png` beside it.

    Raises:
      ValueError: a folder is no workdir, is named twice or has no metrics yet; or `model` is given without `data`.
    """
    if (model is None) != (data is None):
        raise ValueError("--model and --data belong together: the sheet of samples needs both")
    runs = read_runs(workdirs)
    output.parent.mkdir(parents=True, exist_ok=True)
    loss = output.with_name(output.stem + "_loss.png")
    plot_losses(runs, loss)
    written, pictures = [output, loss], [{"title": "Loss", "file": loss.name}]
    if model is not None:
        split = held_out(data)
        sheet = output.with_name(output.stem + "_samples.png")
        plot_samples(answer_samples(model, data, split), sheet, split)
        written.append(sheet)
        pictures.append({"title": f"Images of the split {split}: question, answer, truth", "file": sheet.name})
    page = PAGE.render(
        title=(" → " if any(run.start for run in runs) else ", ").join(run.name for run in runs),
        tables=[table for table in (results(runs), rates(runs), differing(runs)) if table["rows"]],
        pictures=pictures,
        configs=[(run.name, json.dumps(run.config, indent=1)) for run in runs],
    )
    output.write_text(page)
    return written


def results(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the table of what each run reached; a metric that no run has gets no column."""
    keys = {"loss": "last loss", "validation/loss": "validation loss"}
    keys |= {name: named(name) for run in runs for name in run.scores()}
    keys = {key: name for key, name in keys.items() if any(run.last(key) is not None for run in runs)}
    rows = [[run.name, run.rows[-1]["step"], f"{run.last('seconds'):.0f}"] for run in runs]
    for run, row in zip(runs, rows, strict=True):
        row += [with_error(run, key) for key in keys]
    return {"title": "Results", "head": ["run", "steps", "seconds", *keys.values()], "rows": rows}


def with_error(run: Run, key: str) -> str:
    """Formats the last value of a metric, a score with its standard error: "71.23 ± 1.1"."""
    error = run.last(f"{key}_stderr")
    return written(run.last(key)) + ("" if error is None else f" ± {error:.2g}")


def rates(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the table of each run's rates: the median of its logs, without the first, which holds the compilation."""
    keys = {key: name for key, name in RATES.items() if any(run.points(key) for run in runs)}
    rows = []
    for run in runs:
        found = [[value for _, value in run.points(key)] for key in keys]
        rows.append([run.name, *(written(statistics.median(v[1:] or v) if v else None) for v in found)])
    return {"title": "Rates (medians)", "head": ["run", *keys.values()], "rows": rows if keys else []}


def differing(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the table of the config keys in which the runs differ, a column for each run."""
    flat = [dict(flattened(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for own in flat for key in own))
    rows = [[key, *(own.get(key, "-") for own in flat)] for key in keys]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return {"title": "Settings that differ", "head": ["key", *(run.name for run in runs)], "rows": rows}


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
