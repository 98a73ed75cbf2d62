"""Sends what a run tells to Weights & Biases too; wandb is imported only if the config key `wandb` names a project."""

import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fastvlm_jax import distributed
from fastvlm_jax.files import write_whole

COLUMNS = ("id", "image", "question", "answer", "truth", "score")  # of the table of sample answers
ID = "wandb_id"  # file in a workdir that keeps the id of its run
MINUTE = 60.0


def check(project: str) -> None:
    """Raises ValueError, which says what to do, unless process 0 can write runs to `project`; "" means no project."""
    if not project:
        return
    problems = distributed.exchange("wandb", _problem() if jax.process_index() == 0 else None)
    if problems[0]:
        raise ValueError(f"wandb={project!r}: {problems[0]}, or leave --config.wandb empty")


def _problem() -> str | None:
    try:
        import wandb
    except ImportError:
        return "the package is not installed; pip install 'fastvlm_jax[wandb]'"
    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(verify=False, prompt=False):
        return "nobody is logged in; run `wandb login`, set WANDB_API_KEY or, to send it later, WANDB_MODE=offline"
    return None


def open_run(project: str, workdir: pathlib.Path, name: str, config: dict[str, Any]) -> "Tracker | None":
    """Opens the run of a workdir in process 0; returns None in other processes, and for the project ""."""
    return Tracker(project, workdir, name, config) if project and jax.process_index() == 0 else None


class Tracker:
    """Writes to a run of Weights & Biases, the same run whenever its workdir resumes. Only process 0 has a tracker.

    No error of it, of the network or of the disk, stops the training. A run that cannot start online is written offline
    into the workdir; scalars that cannot be sent stay there too. `wandb sync` sends both later.
    """

    def __init__(self, project: str, workdir: pathlib.Path, name: str, config: dict[str, Any]):
        import wandb

        path = workdir / ID
        if not path.exists():
            write_whole(path, f"{uuid.uuid4().hex[:8]}\n".encode())
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, init_timeout=MINUTE, finish_timeout=MINUTE
        )
        arguments = dict(
            project=project, id=path.read_text().strip(), name=name, config=config, dir=workdir, resume="allow"
        )
        try:
            self._run = wandb.init(**arguments, settings=settings)
        except Exception as error:
            print(f"wandb: {_first_line(error)}; written offline, see `wandb sync`", file=sys.stderr)
            wandb.teardown()  # wandb's service still holds the id of the failed run
            self._run = self._guarded(lambda: wandb.init(**arguments, settings=settings, mode="offline"))
        if self._run is not None:
            # A resumed run repeats the steps since its checkpoint; W&B's own step axis would drop them.
            self._guarded(lambda: self._run.define_metric("*", step_metric="step"))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Hands over the scalars of `step`; wandb's own process sends them."""
        if self._run is not None:
            self._guarded(lambda: self._run.log({"step": step, **scalars}))

    def write_predictions(self, step: int, rows: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> None:
        """Hands over the answers to sample questions as a table, in which each has its first image.

        Args:
          rows: lines of predictions.jsonl.
          folder: folder that the names of the images start from.
        """

        def log() -> None:
            import wandb

            table = wandb.Table(columns=list(COLUMNS))
            for row in rows:
                image = wandb.Image(str(folder / row["images"][0])) if row["images"] else None
                truth = "\n".join(row["references"])
                table.add_data(row["id"], image, row["question"], row["answer"], truth, row["score"])
            self._run.log({"step": step, "predictions": table})

        if self._run is not None:
            self._guarded(log)

    def close(self) -> None:
        """Waits, for a minute at most, until everything is sent."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish())

    def _guarded(self, act: Callable[[], Any]) -> Any:
        """Returns what `act` does; None after an error, which never stops the training but ends the tracker's work."""
        try:
            return act()
        except Exception as error:
            print(f"wandb: {_first_line(error)}; no longer written to", file=sys.stderr)
            self._run = None
            return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
