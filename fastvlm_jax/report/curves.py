"""Reads training runs for a report, names them apart, and draws their losses over the steps."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.workdir import read_run

Rows = Sequence[dict[str, float]]
ACCURACY = "validation/accuracy"
MARKERS = "s^Dv<>pP*X"  # of the curves of scores, one a benchmark
# Metrics that are drawn over the steps, and how their panels are named.
OVER_STEPS = {
    "top1_images": "images that find their caption",
    "top1_texts": "captions that find their image",
    "logit_scale": "factor of the logits",
    "loss_soft_excess": "distillation above its least",
    "lr": "highest learning rate",
    "grad_norm": "norm of the gradient",
    "images/s": "images/s",
    "tokens/s": "tokens/s",
    "mfu": "MFU",
    "input_bound": "share of waiting for input",
    "hbm_peak_gb": "most memory so far, GB",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Describes a training run.

    Attributes:
      name: what the report calls it, different for each of its runs.
      rows: lines of its metrics.jsonl.
      config: its settings.
      lineage: where its weights and data come from; see workdir.make_lineage.
      start: step at which its curve begins: 0, or where the run ended whose weights it started from.
    """

    name: str
    rows: Rows
    config: dict[str, Any]
    lineage: dict[str, Any]
    start: int

    def last(self, key: str) -> float | None:
        """Returns the last value of a metric, None if it was never written."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def scores(self) -> dict[str, float]:
        """Returns the scores of the run, as name in the metrics -> what makes percent of it: those of benchmarks and,
        of runs of earlier versions, the share "validation/accuracy"."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        names = [key for key in keys if key.startswith("evaluate/") and not key.endswith("_stderr")]
        return {name: 1.0 for name in names} | ({ACCURACY: 100.0} if ACCURACY in keys else {})

    def points(self, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        """Returns the (step, value) of a metric, the steps counted from `start`, the values times `scale`."""
        return [(self.start + row["step"], scale * row[key]) for row in self.rows if key in row]


def read_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """Reads training runs; each begins where the one among them ended that it started from.

    Raises:
      ValueError: a folder is no workdir, has no metrics yet, or is named twice.
    """
    found, runs = [], []
    for workdir in workdirs:
        rows = read_metrics(workdir)
        if not rows:
            raise ValueError(f"{workdir} has no metrics.jsonl: name the workdir of a training run")
        found.append((workdir, rows, read_run(workdir)))
    for name, (_, rows, run) in zip(names(workdirs, [run["config"]["stage"] for *_, run in found]), found, strict=True):
        parent = _beginning(run["lineage"]["parent"] or {})
        before = [other for other, (*_, own) in zip(runs, found, strict=False) if _beginning(own["lineage"]) == parent]
        start = before[-1].start + int(run["lineage"]["parent_step"] or 0) if before else 0
        runs.append(Run(name, rows, run["config"], run["lineage"], start))
    return runs


def _beginning(lineage: dict[str, Any]) -> dict[str, Any]:
    """Returns what a lineage says of how its run began, which tells runs apart."""
    return {key: value for key, value in lineage.items() if key not in ("step", "changes")}


def names(workdirs: Sequence[pathlib.Path], stages: Sequence[str]) -> list[str]:
    """Returns a name for each run: its stage, or the shortest ends of the paths that differ if stages repeat.

        a/stage1 (stage "align"), a/stage2 (stage "instruct")     align, instruct
        first/tune, second/tune (both of stage "instruct")        first/tune, second/tune
        runs/slow, runs/fast (both of stage "instruct")           slow, fast

    Raises:
      ValueError: a workdir is named twice.
    """
    if all(stages) and len(set(stages)) == len(stages):
        return list(stages)
    parts = [workdir.expanduser().resolve().parts for workdir in workdirs]
    if len(set(parts)) < len(parts):
        twice = next(workdir for workdir, own in zip(workdirs, parts, strict=True) if parts.count(own) > 1)
        raise ValueError(f"{twice} is named twice: name each workdir once")
    length = 1
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    return ["/".join(own[-length:]) for own in parts]


def plot_losses(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Draws training loss, validation loss and scores of all runs, a colour each; a marker for each benchmark."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    names = list(dict.fromkeys(name for run in runs for name in run.scores()))
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}
    validated = any(run.points("validation/loss") for run in runs)
    score_axis = axis.twinx() if names else None
    for i, run in enumerate(runs):
        if points := run.points("loss"):
            axis.plot(*zip(*points, strict=True), "-", color=f"C{i}", label=run.name)
        if points := run.points("validation/loss"):
            axis.plot(*zip(*points, strict=True), "o--", color=f"C{i}", markersize=5)
        for name, scale in run.scores().items():
            points = run.points(name, scale)
            score_axis.plot(*zip(*points, strict=True), f"{markers[name]}:", color=f"C{i}", markersize=5, alpha=0.6)
    for start in {run.start for run in runs} - {0}:
        axis.axvline(start, color="0.85", linewidth=1)
    if validated:
        axis.plot([], [], "o--", color="0.2", label="validation loss")
    for name in names:
        axis.plot([], [], f"{markers[name]}:", color="0.35", label=f"{named(name)} (right)")
    if score_axis:
        # Most scores are percent; MME counts points.
        highest = max(
            value for run in runs for name, scale in run.scores().items() for _, value in run.points(name, scale)
        )
        score_axis.set(ylabel="score", ylim=(0, max(101, 1.05 * highest)))
        score_axis.spines["top"].set_visible(False)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    # 6 and not 6 x 10^0.
    axis.yaxis.set_major_formatter(matplotlib.ticker.LogFormatter())
    axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter())
    axis.spines["top"].set_visible(False)
    entries = len(runs) + validated + len(names)
    columns = min(4, entries)
    figure.tight_layout(rect=(0, 0, 1, 0.99 - 0.06 * -(-entries // columns)))
    legend = axis.get_legend_handles_labels()
    figure.legend(*legend, loc="upper center", ncol=columns, frameon=False, fontsize=9, columnspacing=1.2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_rates(runs: Sequence[Run], path: pathlib.Path) -> bool:
    """Draws learning rate, norm of the gradient, rates, MFU and memory over the steps, a colour for each run.

    Of stage 0 it first draws how well pairs are told apart, which its loss does not say: that depends on the batch.

    Returns:
      Whether the runs have any of them; if not, nothing is drawn.
    """
    keys = [key for key in OVER_STEPS if any(run.points(key) for run in runs)]
    if not keys:
        return False
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns + 0.4, 2.3 * lines + 0.5), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        for i, run in enumerate(runs):
            if points := run.points(key):
                axis.plot(*zip(*points, strict=True), color=f"C{i}", label=run.name)
        axis.set_title(OVER_STEPS[key], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def named(score: str) -> str:
    """Returns how the page names a score: a benchmark by its name, "validation/accuracy" as "validation accuracy"."""
    return score.removeprefix("evaluate/").replace("/", " ")
