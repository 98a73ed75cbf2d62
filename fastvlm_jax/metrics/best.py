"""Follows the score by which a run keeps its best checkpoint, and by which it may end early.

All it needs to remember stands in metrics.jsonl. A killed run that goes on drops the lines behind its last checkpoint,
and so knows what the run knew there:

    step  evaluate/docvqa  checkpoint
     200             61.0  200
     400             71.2  400            the best
     600             70.0  -              1 evaluation since
"""

import math
import pathlib
from collections.abc import Collection, Iterable

from fastvlm_jax import checkpoint, distributed
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.workdir import read_run

MARK = "@best"  # behind a workdir: its best checkpoint


class BestScore:
    """Knows the best evaluation of a run so far, the same in all processes.

    Attributes:
      name: the score, a name in metrics.jsonl; of one that ends in "loss" the lowest is the best, else the highest. ""
        follows nothing.
      step: step of the best evaluation; None before the first.
      value: its score.
      since: number of evaluations after it.
    """

    def __init__(self, name: str, stop_after: int = 0):
        """Follows `name`, in a run that ends behind `stop_after` evaluations without a better one; 0 never ends it."""
        self.name, self._stop_after = name, stop_after
        self.step: int | None = None
        self.value, self.since = math.nan, 0

    def resume(self, workdir: pathlib.Path, start: int, saved: Collection[int]) -> None:
        """Takes up a run that goes on behind step `start` and holds checkpoints of the steps `saved`."""
        rows = [row for row in read_metrics(workdir) if self.name in row and row["step"] <= start]
        self.step = best_step(self.name, rows, saved)
        self.value = next((row[self.name] for row in rows if row["step"] == self.step), math.nan)
        self.since = sum(self.step is None or row["step"] > self.step for row in rows)
        found = distributed.exchange("best score", [self.step, self.value, self.since])
        self.step, self.value, self.since = found[0]  # process 0 wrote the file, others may see it late

    def add(self, step: int, scalars: dict[str, float]) -> bool:
        """Takes in the evaluation of a step, and returns whether it is the best so far."""
        if self.name not in scalars:
            return False
        if better(self.name, scalars[self.name], self.value):
            self.step, self.value, self.since = step, scalars[self.name], 0
            return True
        self.since += 1
        return False

    @property
    def ends(self) -> bool:
        """Returns whether the run ends here."""
        return 0 < self._stop_after <= self.since

    def describe(self) -> str:
        """Returns in words why the run ends."""
        best = "a number" if self.step is None else f"better than {self.value:.4g}, that of step {self.step}"
        return f"in {self.since} evaluations {self.name} was not {best}; --config.stop_after=0 goes on"


def better(name: str, value: float, best: float) -> bool:
    """Returns whether a score is better than the best so far; a number is better than NaN, which is never better."""
    if math.isnan(value) or math.isnan(best):
        return not math.isnan(value)
    return value < best if name.endswith("loss") else value > best


def best_step(name: str, rows: Iterable[dict[str, float]], saved: Collection[int]) -> int | None:
    """Returns the first step with the best score among those with a checkpoint; None if none of them has a score.

    Args:
      rows: lines of metrics.jsonl.
      saved: steps of the checkpoints.
    """
    step, value = None, math.nan
    for row in rows:
        if name in row and row["step"] in saved and better(name, row[name], value):
            step, value = row["step"], row[name]
    return step


def best_of(workdir: pathlib.Path) -> int | None:
    """Returns the step of the best checkpoint of a run; None if it keeps none, or none has the score yet."""
    name = read_run(workdir)["config"].get("keep_best")
    return best_step(name, read_metrics(workdir), checkpoint.steps_of(workdir)) if name else None


def find_best(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the best checkpoint of a run.

    Raises:
      FileNotFoundError, ValueError: the folder is no training workdir, its run keeps no best checkpoint, or no
        checkpoint of it has the score.
    """
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir}{MARK}: there is no training workdir {workdir}")
    name = read_run(workdir)["config"].get("keep_best")
    if not name:
        raise ValueError(f"{workdir}{MARK}: the run keeps no best checkpoint, its config has no keep_best")
    step = best_of(workdir)
    if step is None:
        raise ValueError(f"{workdir}{MARK}: no checkpoint has {name} yet; name the workdir alone for the latest")
    return workdir / checkpoint.FOLDER / str(step)
