"""Starts and ends one process of a job, and lets it exchange values with the others."""

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from fastvlm_jax.config import differences
from fastvlm_jax.distributed import notice
from fastvlm_jax.distributed.peers import Peers
from fastvlm_jax.distributed.rendezvous import Settings
from fastvlm_jax.files import json_digest

START_SECONDS = 4 * 3600.0  # timeout for start-up work of unequal length, such as counting tokens of the data
AGAIN = os.EX_TEMPFAIL  # 75, the exit status that means "run me again"

_peers: Peers | None = None  # connections of this process; None when it runs alone. A global, as in jax.distributed


class Interrupted(KeyboardInterrupt):
    """Raised when the run was asked to stop, after its work is saved.

    Attributes:
      status: exit status of this process, set where a StopRequest ends: 130 after Ctrl-C, AGAIN after SIGTERM or a
        notice of the platform.
    """

    status = 130


@contextlib.contextmanager
def started(settings: Settings | None) -> Iterator[None]:
    """Runs the block as one process of the job, or alone if `settings` is None. Enter it before JAX touches a device.

    If another process is lost, this one prints which and exits with status 1, whatever it is doing. If this process
    fails, it reports why to the others and exits without JAX's shutdown barrier, which the others would never reach.

    Raises:
      TimeoutError, ConnectionError: the processes did not all meet; see rendezvous.meet.
    """
    global _peers
    if settings is None:
        yield
        return
    greeting = {"jax_port": _free_port(settings.host_and_port[1] + 1)} if settings.process_id == 0 else {}
    _peers = Peers(settings, greeting, _exit_on_loss)
    stopped = None
    try:
        _initialize_jax(settings, _peers.greeting["jax_port"])
        try:
            yield
        except Interrupted as error:
            stopped = error
        # It names who does not come; JAX's barrier, which follows, does not. Removing old checkpoints may take long.
        _peers.exchange("the end of the work", seconds=START_SECONDS)
    except BaseException as error:
        _report_failure(error)
        raise
    jax.distributed.shutdown()
    _peers.end()
    _peers = None
    if stopped:
        raise stopped


def _report_failure(error: BaseException) -> None:
    """Reports an error to the others, unless a lost process caused it, and makes this process skip JAX's shutdown."""
    # A collective fails when a process dies, perhaps before `peers` knows which one died.
    collective = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    if _peers.wait_for_loss(_peers.settings.heartbeat_seconds + 2 if collective else 1):
        threading.Event().wait()  # _exit_on_loss ends this process
    text = " ".join(str(error).split())[:500] or type(error).__name__
    _peers.fail(f"stopped: {text}")
    status = 130 if isinstance(error, KeyboardInterrupt) else 1

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # runs after the error is printed, before all other exit handlers


def _exit_on_loss(lost: str) -> None:
    """Prints which process was lost or late and ends this process with status 1."""
    print(f"fastvlm: {lost}", file=sys.stderr, flush=True)
    os._exit(1)


def _free_port(wanted: int) -> int:
    """Returns `wanted` if that port is free, else another free port."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as server:
            return server.getsockname()[1]
    raise ConnectionError("process 0 found no free port for JAX")


def _initialize_jax(settings: Settings, port: int) -> None:
    # JAX's preemption service would take over SIGTERM. Its heartbeat is longer than ours: `peers` reports first.
    jax.config.update("jax_enable_preemption_service", False)
    host = settings.coordinator_address.rpartition(":")[0]
    address = f"{host}:{port}" if settings.process_id == 0 else f"127.0.0.1:{_relay(settings.host_and_port[0], port)}"
    jax.distributed.initialize(
        address,
        settings.num_processes,
        settings.process_id,
        coordinator_bind_address=f"[::]:{port}" if socket.has_dualstack_ipv6() else f"0.0.0.0:{port}",
        initialization_timeout=int(settings.initialization_seconds) + 1,
        heartbeat_timeout_seconds=int(4 * settings.heartbeat_seconds) + 60,
    )


def _relay(host: str, port: int) -> int:
    """Opens a local port that forwards to HOST:PORT and keeps its connections open when the far end closes.

    JAX's client ends its process with a stack dump as soon as the connection to process 0 closes, before `peers` can
    report that process 0 died.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, closing: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        if closing:
            sink.close()

    def serve() -> None:
        kept = []
        while True:
            near, _ = server.accept()
            with contextlib.suppress(OSError):
                far = socket.create_connection((host, port), timeout=10)
                far.settimeout(None)
                threading.Thread(target=pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=pump, args=(far, near, False), daemon=True).start()
            kept.append(near)

    threading.Thread(target=serve, name="to JAX's coordinator", daemon=True).start()
    return server.getsockname()[1]


def exchange(name: str, value: Any = None, seconds: float = 600.0) -> list[Any]:
    """Exchanges a value with all processes: see Peers.exchange. A single process gets [value].

    Raises:
      ValueError: JAX has several processes, but this one is not inside `started`.
      TimeoutError, ConnectionError: not all processes called it; the message names those at fault.
    """
    if _peers is not None:
        return _peers.exchange(name, value, seconds)
    if jax.process_count() > 1:
        raise ValueError(
            "several processes must run inside `with fastvlm_jax.distributed.started(...)`, as `fastvlm train` does"
        )
    return [value]


def mark(doing: str, usual: float | None = None) -> None:
    """Notes what this process begins, which decides how long the others wait for it: see Peers.mark."""
    if _peers is not None:
        _peers.mark(doing, usual)


def slowest() -> str:
    """Returns in words which processes hold up the others, as process 0 knows it; "" for a single process."""
    return "" if _peers is None else _peers.slowest()


def check_same(facts: dict[str, Any]) -> None:
    """Checks that `facts` (JSON-ready) are the same in all processes.

    Raises:
      ValueError: they differ; the message names the first process and key that do.
    """
    own = json_digest(facts)
    if len(set(exchange("digest of the settings", own, START_SECONDS))) == 1:
        return
    first, *others = exchange("settings", json.loads(json.dumps(facts)))
    for process, other in enumerate(others, 1):
        if differ := differences(first, other):
            key, there, here = differ[0]
            raise ValueError(
                f"{_peers.who(process)} differs from {_peers.who(0)}: {key} is {here!r} there and {there!r} in process "
                f"0 ({len(differ)} differ); give all processes the same command, code and data"
            )


class StopRequest:
    """Hears within its context that the run is to stop: SIGINT, SIGTERM or a notice of the platform, to any process.

    The first asks all processes to stop; a second signal ends the process that gets it, at once. Python's own handlers
    wait until the main thread comes back from a compilation or a computation, so a thread hears the signals too.
    """

    def __init__(self):
        self._status, self._places, self._ended = 0, 0, threading.Event()

    def __enter__(self):
        self._before = {s: signal.signal(s, self._let_next_kill) for s in (signal.SIGINT, signal.SIGTERM)}
        heard, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        threading.Thread(target=notice.watch, args=(self._noticed, self._ended), name="notice", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Interrupted):
            error.status = self._status if _peers is None else _peers.stop_status
        self._ended.set()
        signal.set_wakeup_fd(self._wake_before)
        self._wake.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self) -> bool:
        """Returns whether the run stops here, the same in all processes.

        All processes call it at the same places: after every step, and after every batch of a validation.
        """
        self._places += 1
        return bool(self._status) if _peers is None else _peers.stop_reached(self._places)

    def _ask(self, status: int) -> None:
        """Asks all processes to stop, and to end with this exit status unless another was asked for before."""
        if not self._status:
            self._status = status
            if _peers is not None:
                _peers.ask_stop(status)

    def _noticed(self, key: str) -> None:
        print(f"fastvlm: the platform takes this machine away ({key}): saving", file=sys.stderr, flush=True)
        self._ask(AGAIN)

    def _let_next_kill(self, number, frame):
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def _listen(self, heard: socket.socket) -> None:
        """Runs in a thread: reads the number of each signal as it arrives, until the context ends."""
        asked = False
        with heard:
            while numbers := heard.recv(64):
                for number in filter(self._before.__contains__, numbers):
                    if asked:
                        os._exit(128 + number)
                    asked = True
                    self._ask(130 if number == signal.SIGINT else AGAIN)
