"""Keeps the state of a sweep in plain files, each whole or not there, so that a sweep goes on after any stop.

DIR/sweep.json                        the plan, for people and for `fastvlm report`
DIR/lock                              held while a sweep, or a command that it started, is at work here; see lock.py
DIR/logs/TASK.log                     the output of each command
DIR/runs/NAME-DIGEST/                 workdir of a training run, as of `fastvlm train`
DIR/points/NAME/evaluation/           as `fastvlm evaluate --output`
DIR/points/NAME/ttft.json             as `fastvlm bench ttft --output`
DIR/points/NAME/point.json            the digest of the run that the point's files are about
.../finished.json, .../timed.json     a finished task: its digest and its seconds
DIR/results.json                      see results.py
"""

import contextlib
import pathlib
from collections.abc import Iterator

from fastvlm_jax import lock
from fastvlm_jax.config import plain
from fastvlm_jax.files import read_object, write_json
from fastvlm_jax.report.sweep_results import PLAN
from fastvlm_jax.sweep.plan import DIGITS, Plan, Task

FORMAT = "fastvlm_jax sweep"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[int]:
    """Keeps other sweeps out of a folder within the block; yields the descriptor that a command must inherit.

    The lock ends with the last process that holds the descriptor, however it ends.

    Raises:
      ValueError: another sweep, or a command that one left, is at work there, or the folder holds something else.
    """
    foreign = not (workdir / lock.LOCK).exists() or (workdir / "config.json").exists()  # the second is of training
    if workdir.exists() and (not workdir.is_dir() or (foreign and any(workdir.iterdir()))):
        raise ValueError(f"--workdir {workdir} is not empty and no folder of a sweep: choose another")
    with lock.locked(workdir, "another sweep is at work") as held:
        yield held.descriptor


def finished(workdir: pathlib.Path, task: Task) -> dict | None:
    """Returns the record of a task that is finished, {"identity", "seconds", "work", "pace"}; None if it is not."""
    path = workdir / task.record
    if not path.is_file():
        return None
    record = read_object(path)
    return record if record.get("identity") == task.identity else None


def begin(workdir: pathlib.Path, task: Task) -> None:
    """Removes the record of what a task found before, under another config: its files are replaced from now on."""
    (workdir / task.record).unlink(missing_ok=True)


def finish(workdir: pathlib.Path, task: Task, seconds: float) -> dict:
    """Records that a task is finished, and returns the record."""
    record = {"identity": task.identity, "seconds": round(seconds, 1), "pace": task.pace, "work": task.work}
    write_json(workdir / task.record, record)
    return record


def write_plan(workdir: pathlib.Path, plan: Plan) -> None:
    """Writes sweep.json: the settings, the points and every command."""
    sweep = {key: value for key, value in plain(plan.sweep).items() if key != "points"}
    points = [
        {"name": p.point.name, "encoder": p.point.encoder, "llm": p.point.llm, "image_size": p.point.image_size,
         "grids": [list(grid) for grid in p.point.grids], "tasks": list(p.tasks)}
        for p in plan.points
    ]  # fmt: skip
    tasks = [
        {"name": task.name, "output": task.output, "points": list(task.points), "needs": list(task.needs),
         "command": ["fastvlm", *task.arguments]}
        for task in plan.tasks
    ]  # fmt: skip
    write_json(workdir / PLAN, {"format": FORMAT, "config": sweep, "points": points, "tasks": tasks})


def set_aside(workdir: pathlib.Path, plan: Plan) -> list[str]:
    """Renames the folders of points whose model has changed since to NAME-OLDDIGEST; returns a line about each.

    The files of a point say nothing about another model. Files that were kept of the model that is wanted again come
    back, also after a kill between the two. Runs need no renaming: their folders have their digests.
    """
    lines = []
    for planned in plan.points:
        folder, name = workdir / "points" / planned.point.name, planned.point.name
        path = folder / "point.json"
        before = read_object(path).get("run") if path.is_file() else None
        if before == planned.identity:
            continue
        if before is not None:
            kept = folder.with_name(f"{name}-{before[:DIGITS]}")
            folder.rename(kept)
            lines.append(f"point {name} has changed: what it was is kept in {kept}")
        if (again := folder.with_name(f"{name}-{planned.identity[:DIGITS]}")).is_dir():
            again.rename(folder)
        write_json(path, {"run": planned.identity})
    return lines
