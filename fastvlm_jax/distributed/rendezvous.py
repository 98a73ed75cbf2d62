"""Lets the processes of one run meet: all others connect to process 0, which greets them once all have connected."""

import contextlib
import dataclasses
import json
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

MAX_LINE = 1 << 20  # bytes of a message


@dataclasses.dataclass(frozen=True)
class Settings:
    """Describes where the processes of a run meet, and which one this is.

    Attributes:
      coordinator_address: HOST:PORT on which process 0 listens.
      num_processes: number of processes in the run.
      process_id: number of this process, from 0.
      heartbeat_seconds: seconds of silence after which a process counts as frozen.
      initialization_seconds: seconds to wait at the start until all processes have connected.
      late_step_seconds: seconds after which a process that others wait for in a step is late; see marks.Mark.passed.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    heartbeat_seconds: float = 30.0
    initialization_seconds: float = 300.0
    late_step_seconds: float = 300.0

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


class Met(NamedTuple):
    """Holds the connections of a process once all processes have met.

    Attributes:
      sockets: connections by process id: process 0 has one to every other, the others have one to process 0.
      hosts: host name of each process, by process id.
      greeting: the greeting of process 0.
    """

    sockets: dict[int, socket.socket]
    hosts: dict[int, str]
    greeting: dict[str, Any]


def meet(settings: Settings, greeting: dict[str, Any]) -> Met:
    """Waits until all processes have connected; process 0 then sends the others its `greeting`.

    Raises:
      TimeoutError: a process is missing after initialization_seconds; the message names it.
      ConnectionError: process 0 cannot listen, ended early, or refused this process; the message says why.
    """
    met = _welcome_all(settings, greeting) if settings.process_id == 0 else _join(settings)
    for connection in met.sockets.values():
        connection.settimeout(settings.heartbeat_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return met


def _welcome_all(settings: Settings, greeting: dict[str, Any]) -> Met:
    met = Met({}, {0: socket.gethostname()}, greeting)
    deadline = time.monotonic() + settings.initialization_seconds
    with _listen(settings) as server:
        while missing := sorted(set(range(1, settings.num_processes)) - set(met.sockets)):
            left = deadline - time.monotonic()
            if left <= 0:
                why = (
                    f"process {', '.join(map(str, missing[:20]))} of {settings.num_processes} did not connect to "
                    f"{settings.coordinator_address} within {settings.initialization_seconds:g} s: is it running, with "
                    "the same --coordinator_address?"
                )
                for connection in met.sockets.values():
                    send(connection, {"kind": "refused", "why": why})
                raise TimeoutError(why)
            ready = readable([server, *met.sockets.values()], left)
            for process, connection in list(met.sockets.items()):
                if connection in ready:  # nothing is due yet: it ended, and may be started again
                    met.sockets.pop(process).close()
            if server in ready:
                _admit(server.accept()[0], met, settings)
    hosts = {str(process): host for process, host in met.hosts.items()}
    for connection in met.sockets.values():
        send(connection, {"kind": "welcome", "hosts": hosts, "greeting": greeting})
    return met


def _listen(settings: Settings) -> socket.socket:
    _, port = settings.host_and_port
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ConnectionError(
            f"process 0 cannot listen on port {port} of --coordinator_address={settings.coordinator_address}: "
            f"{error.strerror}; choose another port, the same for all processes"
        ) from error


def _admit(connection: socket.socket, met: Met, settings: Settings) -> None:
    """Admits a connection whose first line introduces a process of this run; refuses or closes all others."""
    connection.settimeout(5)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        hello = read_line(connection)
        process, of, host = int(hello["process"]), int(hello["of"]), str(hello["host"])
        if of != settings.num_processes:
            wrong = f"num_processes is {of} here and {settings.num_processes} in process 0"
        elif not 0 < process < of:
            wrong = f"process_id={process} is not from 0 to {of - 1}"
        elif process in met.sockets:
            wrong = f"process_id={process} is taken by another process, on {met.hosts[process]}"
        else:
            met.sockets[process], met.hosts[process] = connection, host
            return
        send(
            connection,
            {"kind": "refused", "why": f"{wrong}: give all processes one --num_processes, each its own --process_id"},
        )
    connection.close()


def _join(settings: Settings) -> Met:
    deadline = time.monotonic() + settings.initialization_seconds
    address, seconds = settings.coordinator_address, settings.initialization_seconds
    while True:
        try:
            connection = socket.create_connection(settings.host_and_port, timeout=10)
            break
        except OSError as error:  # it has not started, or its host name does not resolve yet
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process 0 did not answer at {address} within {seconds:g} s ({error.strerror or error}): is it "
                    "running, and is the port open?"
                ) from error
            time.sleep(0.2)
    send(connection, {"process": settings.process_id, "of": settings.num_processes, "host": socket.gethostname()})
    connection.settimeout(seconds + 30)  # process 0 waits as long for the others, then reports who is missing
    try:
        welcome = read_line(connection)
        if welcome["kind"] == "refused":
            raise ConnectionRefusedError(welcome["why"])
        hosts = {int(process): host for process, host in welcome["hosts"].items()}
        return Met({0: connection}, hosts, welcome["greeting"])
    except ConnectionRefusedError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConnectionError(
            f"process 0 at {address} ended before all {settings.num_processes} processes were connected, or another "
            f"program listens there: {error}"
        ) from error


def readable(connections: Iterable[socket.socket], seconds: float) -> list[socket.socket]:
    """Returns the connections that have something to read or are closed; waits at most `seconds` for one."""
    with selectors.DefaultSelector() as selector:  # select.select fails beyond 1,024 open files
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(seconds)]


def read_line(connection: socket.socket) -> dict[str, Any]:
    """Reads the next message from a connection, and not a byte beyond it.

    Raises:
      ValueError: the line is not JSON, is longer than 1 MiB, or the connection is closed.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ValueError("the connection was closed")
        if len(line) > MAX_LINE:
            raise ValueError(f"a message is longer than {MAX_LINE} bytes: another program sent it")
        line += byte
    return json.loads(line)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message; a closed connection is ignored here, for its reader notices."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
