"""One process of a job: its start, what it exchanges with the others, its end."""

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
from fastvlm_jax.distributed.peers import Peers
from fastvlm_jax.distributed.rendezvous import Settings
from fastvlm_jax.files import json_digest

START_SECONDS = 4 * 3600.0  # for what hosts do at their start, each at its own pace, as counting the tokens of the data

_peers: Peers | None = None  # of this process; None when it is alone, as jax.distributed has it


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; what it had done is saved."""


@contextlib.contextmanager
def started(settings: Settings | None) -> Iterator[None]:
    """One of several processes from its start to its end; `settings` None is one alone. Before JAX has any device.

    When another process is gone this one prints who, and ends with status 1, whatever it is at. When it fails itself
    it tells the others, and leaves without the meeting that JAX holds at the end, to which they would not come.

    Raises:
      TimeoutError, ConnectionError: see rendezvous.meet.
    """
    global _peers
    if settings is None:
        yield
        return
    greeting = {"jax_port": _free_port(settings.host_and_port[1] + 1)} if settings.process_id == 0 else {}
    _peers = Peers(settings, greeting, _stop_too)
    try:
        _initialize_jax(settings, _peers.greeting["jax_port"])
        yield
    except BaseException as error:
        if not isinstance(error, Interrupted):
            _give_up(error)
            raise
        _end()
        raise
    _end()


def _end() -> None:
    global _peers
    jax.distributed.shutdown()
    _peers.end()
    _peers = None


def _give_up(error: BaseException) -> None:
    """Tells the others of an error of this process, unless it is the consequence of one elsewhere; no way back."""
    # A collective fails when a process dies, perhaps before it is known which.
    collective = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    if _peers.wait_for_loss(_peers.settings.heartbeat_seconds + 2 if collective else 1):
        threading.Event().wait()  # _stop_too ends this process
    text = " ".join(str(error).split())[:500] or type(error).__name__
    _peers.fail(f"stopped: {text}")
    status = 130 if isinstance(error, KeyboardInterrupt) else 1

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # called first, after the error is printed


def _stop_too(lost: str) -> None:
    print(f"fastvlm: {lost}", file=sys.stderr, flush=True)
    os._exit(1)


def _free_port(wanted: int) -> int:
    """`wanted`, or another port that nobody listens on."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as server:
            return server.getsockname()[1]
    raise ConnectionError("process 0 finds no free port")


def _initialize_jax(settings: Settings, port: int) -> None:
    # JAX would take SIGTERM from us; its way of finding lost processes comes after ours.
    jax.config.update("jax_enable_preemption_service", False)
    host = settings.coordinator_address.rpartition(":")[0]
    address = f"{host}:{port}" if settings.process_id == 0 else f"127.0.0.1:{_lasting(settings.host_and_port[0], port)}"
    jax.distributed.initialize(
        address,
        settings.num_processes,
        settings.process_id,
        coordinator_bind_address=f"[::]:{port}" if socket.has_dualstack_ipv6() else f"0.0.0.0:{port}",
        initialization_timeout=int(settings.initialization_seconds) + 1,
        heartbeat_timeout_seconds=int(4 * settings.heartbeat_seconds) + 60,
    )


def _lasting(host: str, port: int) -> int:
    """A port of this machine that leads to another's and whose connections do not end when those do.

    JAX's client ends its process with a stack dump the moment that the connection to process 0 closes: before
    `peers` can say that it died.
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
    """What each process gives under `name` (see Peers.exchange); [value] for one alone."""
    if _peers is not None:
        return _peers.exchange(name, value, seconds)
    if jax.process_count() > 1:
        raise ValueError("several processes need fastvlm_jax.distributed.started, as `fastvlm train` has it")
    return [value]


def check_same(facts: dict[str, Any]) -> None:
    """Raises ValueError, naming the process and the key, where `facts` (JSON) are not the same in all processes."""
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
    """Within its context, the first SIGINT or SIGTERM to any process asks for a stop; a second one kills."""

    def __init__(self):
        self._requested = False

    def __enter__(self):
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether the run stops after `step`, the same in all processes; to be asked after every step."""
        return self._requested if _peers is None else _peers.stop_reached(step)

    def _ask(self, number, frame):
        self._requested = True
        signal.signal(number, signal.SIG_DFL)
        if _peers is not None:
            _peers.ask_stop()
