"""Weights & Biases beside the files that every run writes: config key `wandb`. The package is imported for it alone."""

import os
import pathlib
import sys
import uuid
from typing import Any

import jax

from fastvlm_jax import distributed

ID = "wandb_id"  # the file of a workdir that keeps the id of its run
MINUTE = 60.0


def check(project: str) -> None:
    """Raises ValueError, with the mend, where runs cannot be written to `project`; "" is none. Process 0 looks."""
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
    """The run of a workdir in process 0; None in the others, and of no project."""
    return Tracker(project, workdir, name, config) if project and jax.process_index() == 0 else None


class Tracker:
    """A run of Weights & Biases, the same one whenever its workdir goes on. Process 0 alone has one.

    A network that fails never stops the training: a run that cannot be begun online is written offline, into the
    workdir, and what cannot be sent stays there too, both for `wandb sync`.
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
            wandb.teardown()  # its service holds the id of the run that failed
            self._run = wandb.init(**arguments, settings=settings, mode="offline")
        # A resumed run repeats the steps since its checkpoint: they would be dropped on W&B's own axis.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Hands the scalars of `step` over; they are sent by another process."""
        self._guarded(lambda run: run.log({"step": step, **scalars}))

    def close(self) -> None:
        """Waits for what is not sent yet, a minute at most."""
        self._guarded(lambda run: run.finish())

    def _guarded(self, act) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # of any kind: the training is worth more than its picture
            print(f"wandb: {str(error).splitlines()[0]}; no longer written to", file=sys.stderr)
            self._run = None
