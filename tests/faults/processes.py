"""Kills, freezes, delays or cuts off one of two processes of a run; then moves a run between numbers of processes.

What is promised: when a process is lost the others stop within --heartbeat_seconds, and say which; one that lives is
named when it is slow, and stops them after --late_step_seconds. All started again go on from the last checkpoint.
"""

import contextlib
import pathlib
import random
import re
import signal
import socket
import threading
import time

from tests.faults import compare, preload, runs
from tests.faults.compare import expect
from tests.faults.runs import STEPS
from tests.helpers.ports import free_port

HEARTBEAT = 8  # seconds of silence after which a process counts as lost
LATE = 5  # seconds in a step after which a process that lives counts as late
LONGER = ("--config.steps=40", "--config.checkpoint_every=10", f"--heartbeat_seconds={HEARTBEAT}")


def one_of_two_killed(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills one process of two after a random step; the other must name it."""
    return _lose_one(base, folder, rng, signal.SIGKILL, "died")


def one_of_two_frozen(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Freezes one process of two with SIGSTOP after a random step; the other must name it in time."""
    return _lose_one(base, folder, rng, signal.SIGSTOP, "is frozen or cut off")


def one_of_two_delayed(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Freezes one process of two for less than the heartbeat, a few times; both must end as if nothing had been."""
    workdir, victim = folder / "run", rng.randrange(2)
    run = runs.train(base, workdir, *LONGER, processes=2)
    pauses = [rng.uniform(0.2, HEARTBEAT / 3) for _ in range(rng.randint(1, 3))]
    for step, pause in zip(sorted(rng.sample(range(1, 30), len(pauses))), pauses, strict=True):
        if run.until(lambda: compare.has_step(workdir, step)):
            run.processes[victim].send_signal(signal.SIGSTOP)
            time.sleep(pause)
            run.processes[victim].send_signal(signal.SIGCONT)
    for process, (status, text) in enumerate(run.end()):
        expect(status == 0, f"process {process} ended with status {status}: {text[-1000:]}")
    compare.check_same(workdir, straight_pair(base))
    return f"process {victim} for {', '.join(f'{pause:.1f}' for pause in pauses)} s"


def one_of_two_slow(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Lets a write of process 0 take 12 s, while its heartbeats go on: it is named, and waited for."""
    workdir, (environment, row) = folder / "run", _delay(base, folder, rng, 12)
    run = runs.train(base, workdir, *LONGER, processes=2, environment=environment)
    for process, (status, text) in enumerate(run.end()):
        expect(status == 0, f"process {process} ended with status {status}: {text[-1000:]}")
        named = re.search(r"process 0 on \S+ came no further than step \d+", text)
        expect(named or process, f"the process that held up the others was not named: {text[-1000:]}")
    compare.check_same(workdir, straight_pair(base))
    return f"row {row} of the metrics took 12 s"


def one_of_two_late(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Lets a write of process 0 take a minute, while its heartbeats go on: the run stops in time and names it."""
    workdir, (environment, row) = folder / "run", _delay(base, folder, rng, 60)
    run = runs.train(base, workdir, *LONGER, f"--late_step_seconds={LATE}", processes=2, environment=environment)
    run.until(lambda: bool(preload.struck(folder / "operations")))
    begin = time.monotonic()
    for ended in run.end(LATE + 30):
        ended.refusal(r"process 0 on \S+ came no further than step \d+ in \d+ s")
    seconds = time.monotonic() - begin
    expect(seconds < LATE + 25, f"the processes needed {seconds:.0f} s to stop")
    _start_again(base, workdir)
    return f"at row {row} of the metrics; both stopped in {seconds:.1f} s"


def connection_cut(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Cuts the connection between two processes, which leads through a proxy: it falls silent or is closed."""
    workdir, port, silent, step = folder / "run", free_port(), rng.random() < 0.5, rng.randint(1, 30)
    with Proxy(port) as proxy:
        run = runs.train(base, workdir, *LONGER, processes=2, ports=[port, proxy.port])
        run.until(lambda: compare.has_step(workdir, step))
        proxy.cut(silent)
        ended = run.end(HEARTBEAT + 30)
    for process, end in enumerate(ended):
        end.refusal(rf"process {1 - process} on \S+ {'is frozen or cut off' if silent else ''}")
    _start_again(base, workdir)
    return f"after step {step}, {'silent' if silent else 'closed'}"


def processes_and_mesh_changed(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Trains with 4 processes, then 2, 1 and 4, always on another mesh; kills all but the last after a random step."""
    flags = ("--config.model.vision.form=folded", "--config.model.vision.batch_norm=frozen")
    alone, workdir = runs.straight(base, "alone", *flags, devices=4), folder / "run"
    killed = sorted(rng.sample(range(2, STEPS), 3))
    for count, mesh, step in ((4, (1, 4, 1, 1), killed[0]), (2, (1, 2, 2, 1), killed[1]), (1, (1, 2, 1, 2), killed[2])):
        run = runs.train(base, workdir, *flags, f"--config.mesh={mesh}", processes=count, devices=4 // count)
        run.until(lambda: compare.has_step(workdir, step))
        run.kill()
    runs.go_on(base, workdir, *flags, "--config.mesh=(1,1,4,1)", processes=4)
    mine, theirs = ({row["step"]: row["loss"] for row in compare.rows(path)} for path in (workdir, alone))
    expect(list(mine) == list(theirs), f"the steps told are {list(mine)}")
    far = max(abs(mine[step] / theirs[step] - 1) for step in mine)
    expect(far < 1e-5, f"the losses differ by {far:.1e}")
    return f"killed after {killed}: losses to {far:.0e}"


def straight_pair(base: pathlib.Path) -> pathlib.Path:
    """Runs two undisturbed processes, once, and returns their workdir."""
    return runs.straight(base, "pair", *LONGER, processes=2)


def _lose_one(base: pathlib.Path, folder: pathlib.Path, rng: random.Random, number: int, how: str) -> str:
    workdir, victim, step = folder / "run", rng.randrange(2), rng.randint(1, 30)
    run = runs.train(base, workdir, *LONGER, processes=2)
    run.until(lambda: compare.has_step(workdir, step))
    run.processes[victim].send_signal(number)
    begin = time.monotonic()
    other = run.end(HEARTBEAT + 30, leave_out=victim)[1 - victim]
    seconds = time.monotonic() - begin
    other.refusal(rf"process {victim} on \S+ {how}")
    expect(seconds < HEARTBEAT + 10, f"the other process needed {seconds:.0f} s to stop")
    _start_again(base, workdir)
    return f"process {victim} after step {step}; the other stopped in {seconds:.1f} s"


def _delay(base: pathlib.Path, folder: pathlib.Path, rng: random.Random, seconds: int) -> tuple[dict[str, str], int]:
    """Returns the environment in which one row of the metrics, which process 0 writes, takes `seconds`; and which."""
    row, metrics = rng.randint(10, 30), folder / "run" / "metrics.jsonl"
    settings = dict(at=row, count=1, seconds=seconds)
    return preload.striking(base, metrics, folder / "operations", "write", **settings), row


def _start_again(base: pathlib.Path, workdir: pathlib.Path) -> None:
    """Continues a run of two processes and compares its end with that of two that were not disturbed."""
    runs.go_on(base, workdir, *LONGER, processes=2)
    compare.check_same(workdir, straight_pair(base))


class Proxy:
    """Forwards a port of its own to another port of this machine, until it is cut.

    Attributes:
      port: the port at which it listens.
    """

    def __init__(self, target: int):
        self._target, self._server = target, socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        self._silent = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.cut(silent=False)
        self._server.close()

    def cut(self, silent: bool) -> None:
        """Lets no byte through any more, without a word (`silent`) or by closing all connections."""
        self._silent.set()
        for connection in [] if silent else self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the server is closed
            while True:
                near, far = self._server.accept()[0], None
                while far is None:
                    try:
                        far = socket.create_connection(("127.0.0.1", self._target))
                    except ConnectionRefusedError:  # process 0 does not listen yet
                        time.sleep(0.1)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._silent.is_set():
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


FAULTS = [
    one_of_two_killed, one_of_two_frozen, one_of_two_delayed, one_of_two_slow, one_of_two_late, connection_cut,
    processes_and_mesh_changed,
]  # fmt: skip
