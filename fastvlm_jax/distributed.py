"""Several processes that train one model: how they start, agree and end. Everything here also works for one alone.

Give every process the same command. How many there are, and which this is, comes from flags, from the environment, or
from the platform (Cloud TPU slices, GKE, Slurm, Open MPI), in this order:

    fastvlm train --config ... --workdir DIR --coordinator_address=10.0.0.2:8476 --num_processes=4 --process_id=0..3
    FASTVLM_COORDINATOR_ADDRESS, FASTVLM_NUM_PROCESSES, FASTVLM_PROCESS_ID; JAX_COORDINATOR_ADDRESS and so on
    nothing, on a platform that JAX detects; on any other machine one process runs, and waits for nobody

--num_processes=1 is one process on any platform. Process 0 listens on the port of the address for `peers`, and on the
next, or a free one, for JAX. A process that dies stops the others at once, one that freezes or is cut off after
--heartbeat_seconds; each prints who it was, and ends with status 1. SIGINT or SIGTERM to one process stops all after
the same step, which is saved, with status 130. Either way, the same command on all goes on from the last checkpoint.
"""

import atexit
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from fastvlm_jax.config import differences
from fastvlm_jax.peers import Peers
from fastvlm_jax.rendezvous import Settings

START_SECONDS = 4 * 3600.0  # for what hosts do at their start, each at its own pace, as counting the tokens of the data
NAMES = ("coordinator_address", "num_processes", "process_id")

_peers: Peers | None = None  # of this process; None when it is alone, as jax.distributed has it


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; what it had done is saved."""


def find_settings(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: float | None = None,
    initialization_seconds: float | None = None,
) -> Settings | None:
    """What flags, environment and platform say (see above); None for one process alone.

    Raises:
      ValueError: they say only a part, or what cannot be.
    """
    seconds = {
        "heartbeat_seconds": _number("heartbeat_seconds", heartbeat_seconds, float, 30.0),
        "initialization_seconds": _number("initialization_seconds", initialization_seconds, float, 300.0),
    }
    for name, value in seconds.items():
        if not 0 < value < 1e6:
            raise ValueError(f"--{name}={value:g} must be a positive number of seconds")
    address = coordinator_address or _variable("coordinator_address")[1]
    count = _number("num_processes", num_processes, int)
    process = _number("process_id", process_id, int)
    if count == 1 and process in (None, 0):
        return None
    if None in (address, count, process):
        found = _detect(address, count, process, seconds["initialization_seconds"])
        if found == (None, None, None) or (found[1] == 1 and address is None):
            return None
        missing = [f"--{name}" for name, value in zip(NAMES, found, strict=True) if value is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing: --{', --'.join(NAMES)} (or FASTVLM_{NAMES[0].upper()} and so on) go "
                "together, unless the platform is one that tells them"
            )
        address, count, process = found
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ValueError(f"--coordinator_address={address} must be HOST:PORT, of process 0")
    if not 0 <= process < count:
        raise ValueError(f"--process_id={process} must be from 0 to {count - 1}: --num_processes is {count}")
    return Settings(address, count, process, **seconds)


def _variable(name: str) -> tuple[str, str | None]:
    """The environment variable that sets a flag, and its value."""
    for prefix in ("FASTVLM", "JAX"):
        if value := os.environ.get(f"{prefix}_{name.upper()}"):
            return f"{prefix}_{name.upper()}", value
    return "", None


def _number(name: str, value: Any, kind: type, default: Any = None) -> Any:
    variable, text = _variable(name)
    if value is not None or text is None:
        return default if value is None else value
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text!r} must be a number") from error


def _detect(*given) -> tuple[str | None, int | None, int | None]:
    """(address, number, id) with what the platform tells in the place of what is None."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; public is only the whole

    *known, seconds = given
    try:
        with warnings.catch_warnings(action="ignore"):  # that the package `kubernetes` is missing
            return ClusterEnv.auto_detect_unset_distributed_params(*known, None, None, int(seconds))[:3]
    except Exception as error:
        raise ValueError(
            f"the platform does not tell which process of how many this is ({' '.join(str(error).split())}): give "
            f"--{', --'.join(NAMES)}, or --num_processes=1"
        ) from error


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
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
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


def source_digest() -> str:
    """A hash of the package's source files."""
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


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
