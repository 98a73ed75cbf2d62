"""Gathers what the files of a sweep say about its points, for results.json and the figures of `fastvlm report`."""

import contextlib
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

from etils import epath

from fastvlm_jax.evaluate.benchmarks import known
from fastvlm_jax.files import read_object
from fastvlm_jax.images.sizes import slots_of
from fastvlm_jax.metrics.rows import FILE
from fastvlm_jax.sweep import state
from fastvlm_jax.sweep.plan import Plan, PlannedPoint

BLIND = "-blind"  # ends the name of a benchmark whose questions are asked about another picture


def collect(
    plan: Plan, workdir: pathlib.Path, place: str, errors: Mapping[str, str], here: bool = True
) -> dict[str, Any]:
    """Returns the content of results.json.

    {"setup", "title", "benchmarks", "points": [{"name", "encoder", "llm", "image_size", "grid", "image_tokens",
    "parameters", "state", "error", "accuracy", "mean", "mean_standard_error", "ttft", "runs", "train_seconds"}],
    "paper_figure", "machine"}. Where both are asked, the score of "x-blind" is the value "blind" of the benchmark x and
    is in no mean.

    Args:
      place: folder, local or gs://, that has runs/ and points/.
      errors: name of a point -> why it failed.
      here: whether the commands ran on this machine, which is then described.
    """
    return {
        "setup": plan.sweep.setup,
        "title": plan.sweep.title,
        "benchmarks": _benchmarks(plan),
        "points": [_point(plan, planned, workdir, place, errors) for planned in plan.points],
        "paper_figure": plan.sweep.paper_figure or None,
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()}
        if here
        else None,
    }


def _point(plan: Plan, planned: PlannedPoint, workdir: pathlib.Path, place: str, errors) -> dict[str, Any]:
    point, tasks = planned.point, {task.name: task for task in plan.tasks}
    own = [tasks[name] for name in planned.tasks]
    done = {task.kind: bool(state.finished(workdir, task)) for task in own if task.kind != "train"}
    folder = epath.Path(place) / "points" / point.name
    accuracy = _accuracy(plan, folder / "evaluation") if done["evaluate"] else {}
    values = [found["value"] for found in accuracy.values()]
    deviations = [found["standard_error"] for found in accuracy.values()]
    whole = bool(values) and None not in values
    error = errors.get(point.name)
    timed = read_object(folder / "ttft.json")["points"][0] if done.get("ttft") else None
    seconds = [_train_seconds(epath.Path(place) / tasks[name].output) for name in planned.runs]
    return {
        "name": point.name,
        "encoder": point.encoder,
        "llm": point.llm,
        "image_size": point.image_size,
        "grid": list(max(point.grids, key=slots_of)) if point.grids else None,
        "image_tokens": planned.image_tokens,
        "parameters": planned.parameters,
        "state": "failed" if error else "done" if all(done.values()) else "pending",
        "error": error,
        "accuracy": accuracy,
        "mean": sum(values) / len(values) if whole else None,
        "mean_standard_error": math.hypot(*deviations) / len(values) if whole and None not in deviations else None,
        "ttft": timed,
        "runs": [tasks[name].output for name in planned.runs],
        "train_seconds": None if None in seconds else round(sum(seconds), 1),
    }


def _benchmarks(plan: Plan) -> list[str]:
    """Returns the names of the benchmarks, without those whose score is the blind one of another."""
    names = [benchmark.name for benchmark in known(plan.sweep.benchmarks)]
    return [name for name in names if name not in {other + BLIND for other in names}]


def _accuracy(plan: Plan, folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Reads the summaries of `fastvlm evaluate`."""
    found = {}
    for benchmark in known(plan.sweep.benchmarks):
        name = f"{benchmark.name}-{benchmark.protocol(plan.sweep.protocol or None).name}.json"
        found[benchmark.name] = read_object(folder / name)
    return {
        name: {
            "value": found[name]["score"],
            "standard_error": found[name]["standard_error"],
            "n": found[name]["n"],
            "blind": found.get(name + BLIND, {}).get("score"),
        }
        for name in _benchmarks(plan)
    }


def _train_seconds(run: epath.Path) -> float | None:
    """Returns the seconds that a run has trained for, in all its starts; None before its first log."""
    path = run / FILE
    for line in reversed(path.read_text().splitlines() if path.is_file() else []):
        with contextlib.suppress(ValueError):  # a kill may have cut the last line
            return json.loads(line)["seconds"]
    return None


def _processor() -> str:
    """Returns the name of this machine's processor."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
