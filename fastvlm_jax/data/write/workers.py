"""Jobs shared out to processes of their own; a process that dies, or whose parent does, leaves no other hanging."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


def share_out(work: Callable[[Any, Callable], None], jobs: Sequence[Any], workers: int, told: Callable) -> None:
    """Calls `work(job, report)` for every job, in order; what it reports arrives here as `told(job, *what)`.

    `told(job)` alone says that the job is done. With one worker all happens in this process.

    Raises:
      ValueError: the first job that failed, or a process that was killed.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            work(job, lambda *what: told(job, *what))
            told(job)
        return
    waiting = list(reversed(jobs))
    busy: dict[Connection, Any] = {}  # the job of each process
    spawn = multiprocessing.get_context("spawn")
    processes = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()  # or its end would never be seen
            processes[ours] = process
            busy[ours] = waiting.pop()
            ours.send(busy[ours])
        while busy:
            for connection in wait(list(busy)):
                try:
                    kind, what = connection.recv()
                except (EOFError, OSError):
                    processes[connection].join(5)
                    raise ValueError(
                        f"a worker process was killed (status {processes[connection].exitcode}; out of memory?): "
                        "run the same command again and it goes on, with fewer --workers if memory is short"
                    ) from None
                if kind == "failed":
                    raise ValueError(what)
                told(busy[connection], *what)
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent tells us
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            job = connection.recv()
            try:
                work(job, lambda *what: connection.send(("report", what)))
            except ConnectionError:
                raise
            except (ValueError, OSError) as error:
                connection.send(("failed", str(error)))
            except Exception as error:
                connection.send(("failed", f"{type(error).__name__}: {error}"))
            else:
                connection.send(("done", ()))
