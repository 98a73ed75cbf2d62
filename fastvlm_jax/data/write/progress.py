"""Runs the jobs of a write and tells how far they are."""

import dataclasses
from collections.abc import Callable, Sequence

from fastvlm_jax.data.write.job import Job, complete


@dataclasses.dataclass(frozen=True)
class Progress:
    """Describes how far a write is.

    Attributes:
      done: number of finished jobs; those of earlier runs count once they are checked.
      jobs: number of all jobs.
      records: number of records that this run wrote.
      bytes: size of these records.
      rejected: number of entries that this run rejected.
    """

    done: int = 0
    jobs: int = 0
    records: int = 0
    bytes: int = 0
    rejected: int = 0


def run_jobs(jobs: Sequence[Job], share_out: Callable, progress: Callable[[Progress], None] | None) -> None:
    """Completes all jobs of a write, and calls `progress` at the start and whenever a job reports.

    Args:
      jobs: the jobs; those that an earlier run finished are only checked.
      share_out: function that calls `complete` for every job, see workers.py and ray_runner.py; its errors are raised.
      progress: function that is called with the progress; None for none.
    """
    state = Progress(jobs=len(jobs))

    def on_report(job: Job, *counts: int) -> None:
        nonlocal state
        records, size, rejected = counts or (0, 0, 0)
        state = Progress(
            state.done + (not counts), state.jobs, state.records + records, state.bytes + size,
            state.rejected + rejected,
        )  # fmt: skip
        if progress:
            progress(state)

    if progress:
        progress(state)
    try:
        share_out(complete, jobs, on_report)
    except KeyboardInterrupt as stop:
        stop.args = ("stopped; the same command goes on from here",)
        raise
