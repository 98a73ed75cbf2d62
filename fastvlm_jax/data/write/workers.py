"""Shares jobs out to worker processes; if a worker or the parent dies, no other process is left hanging."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fastvlm_jax import disk


def share_out(work: Callable[[Any, Callable], None], jobs: Sequence[Any], on_report: Callable, workers: int) -> None:
    """Calls `work(job, report)` for every job, started in order; `report(*args)` calls `on_report(job, *args)` here.

    `on_report(job)` without more arguments means that the job is done. With one worker, or one job, everything happens
    in this process.

    Raises:
      ValueError: a job failed, or a worker process was killed. With one worker, `work`'s own errors are raised.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            work(job, lambda *args: on_report(job, *args))
            on_report(job)
        return
    waiting = list(reversed(jobs))
    busy: dict[Connection, Any] = {}  # connection to a worker -> its job
    spawn = multiprocessing.get_context("spawn")
    processes = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()  # otherwise the death of the worker would not close the connection
            processes[ours] = process
            busy[ours] = waiting.pop()
            ours.send(busy[ours])
        while busy:
            for connection in wait(list(busy)):
                try:
                    kind, content = connection.recv()
                except (EOFError, OSError):
                    processes[connection].join(5)
                    raise ValueError(
                        f"a worker process was killed (status {processes[connection].exitcode}; out of memory?): "
                        "run the same command again to go on, with fewer --workers if memory is short"
                    ) from None
                if kind == "failed":
                    raise ValueError(content)
                on_report(busy[connection], *content)
                if kind == "done":
                    del busy[connection]
                    if waiting:
                        busy[connection] = waiting.pop()
                        connection.send(busy[connection])
    finally:
        for connection, process in processes.items():
            process.terminate()
            connection.close()
        for process in processes.values():
            process.join()


def _serve(connection: Connection, work: Callable) -> None:
    # Ctrl-C reaches every process of a terminal; the parent stops this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            job = connection.recv()
            wrong = attempt(work, job, lambda *args: connection.send(("report", args)))
            connection.send(("failed", wrong) if wrong else ("done", ()))


def attempt(work: Callable[[Any, Callable], None], job: Any, report: Callable) -> str:
    """Calls `work(job, report)`; returns what went wrong in a line, "" if nothing did."""
    try:
        work(job, report)
    except OSError as error:
        return disk.describe(error) or type(error).__name__
    except ValueError as error:
        return str(error) or type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
