"""Runs the tasks of a sweep one after the other, skips what is finished, and goes on when one fails."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastvlm_jax.distributed import AGAIN, Interrupted, StopRequest
from fastvlm_jax.files import write_json
from fastvlm_jax.report.sweep_results import RESULTS
from fastvlm_jax.sweep import launcher as launching
from fastvlm_jax.sweep import results, state
from fastvlm_jax.sweep.launcher import Launcher
from fastvlm_jax.sweep.plan import Plan, Task

SHOWN = 300  # characters of the last line of a log in a message


def run(
    plan: Plan, workdir: pathlib.Path, place: str, launcher: Launcher, lock: int, told: Callable[[str], None]
) -> dict[str, str]:
    """Runs all tasks that are not finished, and returns name of a point -> why it failed.

    results.json is written before the first task, so that it never tells of another config, and after every one.

    Args:
      workdir: folder of the sweep's state; see state.py.
      place: folder, local or gs://, that has runs/ and points/.
      lock: descriptor of state.locked.
      told: function that is called with each line about the progress.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the task at work was stopped, as that signal stops it.
    """
    failed: dict[str, str] = {}  # task -> why
    done = {task.name: record for task in plan.tasks if (record := state.finished(workdir, task))}
    todo = [task for task in plan.tasks if task.name not in done and launcher.runs(task)]
    if done:
        told(f"{len(done)} of {len(plan.tasks)} tasks were finished before")
    if left_out := [task for task in plan.tasks if not launcher.runs(task)]:
        told(f"{len(left_out)} timing tasks are left out: --ttft_settings FILE gives a machine for them")

    def write_results() -> None:
        here = launcher.name in ("", "local")
        write_json(workdir / RESULTS, results.collect(plan, workdir, place, errors_of(plan, failed), here))

    first = len(done) + 1
    write_results()
    with StopRequest() as stop:
        for number, task in enumerate(todo, first):
            if stop.reached():
                raise Interrupted(f"stopped before {task.name}; the same command goes on from there")
            if broken := next((name for name in task.needs if name in failed), None):
                failed[task.name] = failed[broken]
                told(f"[{number} of {len(plan.tasks)}] {task.name} is left out: {broken} failed")
                continue
            told(f"[{number} of {len(plan.tasks)}] {task.name}{time_left(todo[number - first :], done.values())}")
            state.begin(workdir, task)
            begin = time.monotonic()
            error = start(task, workdir, launcher, lock, stop)
            if error is None:
                done[task.name] = state.finish(workdir, task, time.monotonic() - begin)
            else:
                failed[task.name] = f"{task.name}: {error}"
                told(f"{failed[task.name]} (see {log_of(workdir, task)})")
            write_results()
    return errors_of(plan, failed)


def log_of(workdir: pathlib.Path, task: Task) -> pathlib.Path:
    """Returns the file that gets the output of a task's command."""
    return workdir / "logs" / f"{task.name}.log"


def start(task: Task, workdir: pathlib.Path, launcher: Launcher, lock: int, stop: StopRequest) -> str | None:
    """Runs the command of a task to its end; returns None if it succeeded, else the last line of its log.

    A command that was stopped from outside, and says with its status that it wants to go on, is started again.

    Raises:
      Interrupted: the sweep was asked to stop, and the command has ended.
    """
    log = log_of(workdir, task)
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as out:
        position, status = out.tell(), AGAIN
        while status == AGAIN and not stop.reached():
            child = subprocess.Popen(
                launching.ending_with_this(launcher.command(task), os.getpid()), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
            try:
                while child.poll() is None and not stop.reached():
                    _wait(child, 0.2)
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)
            finally:
                status = child.wait()
    if stop.reached() and status != 0:
        raise Interrupted(f"stopped in {task.name}; the same command goes on from there")
    if status == 0:
        return None
    with log.open("rb") as file:
        file.seek(position)
        lines = file.read().decode(errors="replace").strip().splitlines()
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}: {lines[-1][:SHOWN]}" if lines else ended


def _wait(child: subprocess.Popen, seconds: float) -> None:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def errors_of(plan: Plan, failed: Mapping[str, str]) -> dict[str, str]:
    """Returns name of a point -> why the first of its tasks failed."""
    return {
        planned.point.name: failed[name]
        for planned in plan.points
        for name in reversed(planned.tasks)
        if name in failed
    }


def time_left(todo: Sequence[Task], done: Iterable[Mapping[str, Any]]) -> str:
    """Returns ", about 12 minutes left", by the pace of what was measured; "" before anything comparable was.

    It is "at least" where tasks are left of a kind that was not measured yet.
    """
    rates: dict[str, list[float]] = {}
    for record in done:
        rate = rates.setdefault(record["pace"], [0.0, 0.0])
        rate[0] += record["seconds"]
        rate[1] += record["work"]
    known = [task.work * rates[task.pace][0] / rates[task.pace][1] for task in todo if rates.get(task.pace, [0, 0])[1]]
    if not known:
        return ""
    minutes = max(1, round(sum(known) / 60))
    word = "about" if len(known) == len(todo) else "at least"
    return f", {word} {minutes:,} minute{'s' * (minutes > 1)} left"
