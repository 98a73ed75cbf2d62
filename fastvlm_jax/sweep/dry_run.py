"""Tells what a sweep would do: its points with their tokens, its tasks in order, and estimated chip-hours."""

import math
from typing import Any

from fastvlm_jax.evaluate.paper import NAMES
from fastvlm_jax.images.sizes import slots_of
from fastvlm_jax.preflight import run, topology
from fastvlm_jax.preflight.describe import table
from fastvlm_jax.preflight.estimate import records_of
from fastvlm_jax.sweep import fit
from fastvlm_jax.sweep.plan import Plan, Task

ESTIMATES = {
    "arithmetic": "by arithmetic alone: FLOPs and bytes over published rates",
    "compiler": "by the TPU compiler, for the settings as given",
}


def describe(plan: Plan, name: str | None = None, estimate: str = "arithmetic") -> str:
    """Returns the text of `fastvlm sweep --dry_run`.

    Args:
      name: TPU slices to estimate chip-hours for, as "v5e:4x4"; None for none.
      estimate: a key of ESTIMATES. The compiler's takes minutes for each run of full size, and is kept on disk.

    Raises:
      ValueError: see topology.parse and preflight.
    """
    slices = topology.parse(name) if name else None
    guess = {"arithmetic": _arithmetic, "compiler": _compiled}[estimate]
    costs = {task.name: guess(task, slices) for task in plan.tasks if slices and task.kind == "train"}
    rows = [["point", "encoder", "LLM", "px", "grid", "tokens", "runs"]]
    for planned in plan.points:
        point = planned.point
        grids = " ".join(f"{rows}x{columns}" for rows, columns in point.grids) or "-"
        tokens, names = f"{planned.image_tokens:,}", str(len(planned.runs))
        encoder, llm = (NAMES.get(name, name) for name in (point.encoder, point.llm))
        rows.append([point.name, encoder, llm, str(point.image_size), grids, tokens, names])
    runs = [task for task in plan.tasks if task.kind == "train"]
    lines = [
        f"{plan.sweep.title}: {len(plan.points)} points, {len(runs)} training runs, {len(plan.tasks)} tasks",
        table(rows), "", "in this order:", table(_order(plan, costs)),
    ]  # fmt: skip
    if plan.sweep.ttft:
        lines.append("  then, when nothing else of the sweep runs, each point is timed by fastvlm bench ttft")
    lines.append("")
    if slices:
        lines.append(_total(costs, slices, estimate))
        changed = sum(found["fits"] and not found.get("given", True) for found in costs.values())
        if changed:
            lines.append(
                f"{changed} runs (*) do not fit as they are, and are estimated with settings that do: "
                f"--config.fit={name} gives every run mesh, accumulate and remat that fit by arithmetic"
            )
    if plan.missing:
        lines.append(f"weights still to be given: {' '.join(f'--config.weights.{name}=DIR' for name in plan.missing)}")
    return "\n".join(lines).rstrip()


def _order(plan: Plan, costs: dict[str, dict[str, Any]]) -> list[list[str]]:
    head = ["task", "px", "points"] + ["estimated steps", "step", "GiB a device", "chip-hours"] * bool(costs)
    rows = [head]
    for task in plan.tasks:
        if task.kind == "ttft":
            continue
        many = len(task.points) > 1
        row = [task.name, str(task.config.data.image_size), f"{len(task.points)} share it" if many else task.points[0]]
        if costs:
            found = costs.get(task.name, {})
            row += [
                f"{found['steps']:,}" if found.get("steps") else "-",
                f"{1000 * found['seconds']:,.0f} ms" if found.get("seconds") else "-",
                _memory(found),
                _hours(found.get("chip_hours")),
            ]
        rows.append(row)
    return rows


def _memory(found: dict[str, Any]) -> str:
    if not found:
        return "-"
    mark = " DOES NOT FIT" if not found["fits"] else "" if found.get("given", True) else " *"
    return f"{found['bytes'] / 2**30:.1f}{mark}"


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}"


def _total(costs: dict[str, dict[str, Any]], slices: topology.Slice, estimate: str) -> str:
    known = [found["chip_hours"] for found in costs.values() if found.get("chip_hours") is not None]
    unfit = sum(not found.get("fits", True) for found in costs.values())
    unknown = len(costs) - len(known) - unfit
    left_out = f", {unfit} runs left out that do not fit" if unfit else ""
    left_out += f", {unknown} runs left out whose data or settings give no estimate" if unknown else ""
    return (
        f"{_hours(sum(known))} chip-hours of training on {slices.name}, estimated {ESTIMATES[estimate]}{left_out}; "
        "scoring and timing not counted. Nothing ran on a TPU."
    )


def steps_of(config) -> int | None:
    """Returns the optimizer steps of a run; None if the size of its data is not known.

    The data are those that the paper names. A record is counted as one image, with all its tiles.
    """
    images = config.data.groups * config.data.images_per_group / max(map(slots_of, config.data.grids), default=1)
    records = records_of(config, None)
    return config.steps or (math.ceil(records / images) if records is not None and images else None)


def _arithmetic(task: Task, slices: topology.Slice) -> dict[str, Any]:
    ranked = fit.candidates(task.config, slices)
    if not ranked:
        return {}
    own = fit.as_given(task.config, slices, ranked)
    chosen = own or ranked[0]
    cost = _cost(chosen.seconds, chosen.bytes, fit.fits(chosen, slices), steps_of(task.config), slices)
    return cost | {"given": own is not None}


def _compiled(task: Task, slices: topology.Slice) -> dict[str, Any]:
    try:
        report = run.preflight(task.config, slices.name)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from error
    seconds = report["time"]["scheduled_s"] if "time" in report else None
    memory = report["memory"]
    return _cost(seconds, memory["total"], memory["fits"], steps_of(task.config), slices)


def _cost(seconds, size, fits, steps, slices: topology.Slice) -> dict[str, Any]:
    known = seconds is not None and steps is not None and fits
    hours = steps * seconds / 3600 * slices.chips if known else None
    return {"seconds": seconds, "bytes": size, "fits": fits, "steps": steps, "chip_hours": hours}
