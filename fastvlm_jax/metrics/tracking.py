"""Sends a run's scalars to Weights & Biases too; wandb is imported only if the config key `wandb` names a project."""

import os
import pathlib
import sys
import uuid
from typing import Any

import jax

from fastvlm_jax import distributed

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

    A network error never stops the training. A run that cannot start online is written offline into the workdir;
    scalars that cannot be sent stay there too. `wandb sync` sends both later.
    """

    def __init__(self, project: str, workdir: pathlib.Path, name: str, config: dict[str, Any]):
        import wandb

        path = workdir / ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8] + "\n")
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, init_timeout=MINUTE, finish_timeout=MINUTE
        )
        arguments = dict(
            project=project, id=path.read_text().strip(), name=name, config=config, dir=workdir, resume="allow"
        )
        try:
            self._run = wandb.init(**arguments, settings=settings)
        except Exception as error:
            print(f"wandb: {str(error).splitlines()[0]}; written offline, see `wandb sync`", file=sys.stderr)
            wandb.teardown()  # wandb's service still holds the id of the failed run
            self._run = wandb.init(**arguments, settings=settings, mode="offline")
        # A resumed run repeats the steps since its checkpoint; W&B's own step axis would drop them.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Hands over the scalars of `step`; wandb's own process sends them."""
        self._guarded(lambda run: run.log({"step": step, **scalars}))

    def close(self) -> None:
        """Waits, for a minute at most, until everything is sent."""
        self._guarded(lambda run: run.finish())

    def _guarded(self, act) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # no error of the tracker may stop the training
            print(f"wandb: {str(error).splitlines()[0]}; no longer written to", file=sys.stderr)
            self._run = None
