"""Writes a run's scalars: a progress bar or plain lines, metrics.jsonl and TensorBoard files."""

import json
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import tqdm

from fastvlm_jax import disk
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.metrics.log_file import LogFile
from fastvlm_jax.metrics.predictions import Predictions
from fastvlm_jax.metrics.rows import FILE, keep_until
from fastvlm_jax.metrics.tensorboard import Board
from fastvlm_jax.metrics.tracking import Tracker

UNSHOWN = ("grad_norm", "lr/", "lr_lowest")  # beginnings of the names of scalars that are not printed


class MetricsWriter:
    """Writes scalars by step, to the workdir and to a tracker, and keeps the time of the run.

    metrics.jsonl holds a JSON object a line with "step", "seconds" and the scalars; seconds count the training before a
    resume too. A resumed run drops the lines after the step it resumes from, so that every step appears once.
    Only process 0 writes and shows anything; the others keep the time. A disk that fails does not end the run; see
    LogFile.
    """

    def __init__(self, workdir: pathlib.Path, name: str, step: int, steps: int, tracker: Tracker | None = None):
        self._writes, self._tracker = jax.process_index() == 0, tracker
        kept = keep_until(workdir / FILE, step) if self._writes else []
        self._interactive = self._writes and sys.stderr.isatty()
        if self._writes:
            self._rows, self._board = LogFile(workdir / FILE), Board(workdir / "tensorboard", step)
            self._predictions = Predictions(workdir, step)
        self._bar = tqdm.tqdm(
            total=steps, initial=step, desc=name, unit="step", dynamic_ncols=True, disable=not self._interactive
        )
        self._name, self._steps, self._first = name, steps, step
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Returns the seconds of training so far, including those before a resume."""
        return self._before + time.monotonic() - self._start

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of `step` to all files; prints them without gradient norm and rates of single groups."""
        if not self._writes:
            return
        scalars = {key: float(value) for key, value in scalars.items()}
        seconds = round(self.seconds(), 3)
        self._rows.append((json.dumps({"step": step, "seconds": seconds, **scalars}) + "\n").encode())
        self._board.write(step, scalars)
        if self._tracker:
            self._tracker.write(step, scalars)
        shown = {key: f"{value:.4g}" for key, value in scalars.items() if not key.startswith(UNSHOWN)}
        if self._interactive:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(shown)
        else:
            done = max(step - self._first, 1)
            left = (time.monotonic() - self._start) / done * (self._steps - step)
            shown = "  ".join(f"{key} {value}" for key, value in shown.items())
            disk.tell(f"{self._name} step {step}/{self._steps}  {shown}  {left:.0f} s left")

    def write_predictions(self, step: int, results: Sequence[Result]) -> None:
        """Writes the answers to sample questions, with their images, to all files, and says how many are right."""
        if not self._writes:
            return
        rows = self._predictions.write(step, results)
        self._board.write_predictions(step, rows, self._predictions.folder)
        if self._tracker:
            self._tracker.write_predictions(step, rows, self._predictions.folder)
        right = sum(row["score"] == 1 for row in rows)
        where = self._predictions.path
        disk.tell(f"{self._name} step {step}/{self._steps}  {right} of {len(rows)} sample answers are right: {where}")

    def flush(self) -> None:
        """Writes what a failing disk did not take.

        Raises:
          OSError: it still does not.
        """
        if self._writes:
            for file in (self._rows, self._board, self._predictions):
                file.flush()

    def close(self) -> None:
        """Ends the display and the tracker's run; tells which file lacks what."""
        try:
            self.flush()
        except OSError as error:
            disk.tell(f"{disk.describe(error)}; the last rows are missing there")
        self._bar.close()
        if self._tracker:
            self._tracker.close()
