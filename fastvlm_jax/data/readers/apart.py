"""Reads sources in a process of its own, for which a file may cost no more than time and memory that are set here.

PDFium and Arrow are large libraries in C++. A page of ten million drawing commands or a table's page of 2 GB keeps them
busy, or ends the process, and nothing in Python can stop them. So the process may die: what it was reading is refused,
and the next part gets another one.

    this process   {"call": "read", "format": "pdf", ...}  ──>  python -m fastvlm_jax.data.readers.apart
                   <──  entry, entry, ..., done                 msgpack, over a pair of sockets
"""

import contextlib
import dataclasses
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgpack
from etils import epath

from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.recognise import reader
from fastvlm_jax.data.record import Record, Rejected, pack, unpack

FORMATS = ("parquet", "pdf")
SECONDS = 60  # seconds of processor time for an entry, and for finding the parts of a source
MEMORY = 6 << 30  # bytes that reading may add: a record of 1 GB, which is copied a few times on its way
_idle: list["_Child"] = []  # processes that wait for the next part


class _Child:
    """Holds a process that reads, and the connection to it."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", __spec__.name, str(theirs.fileno())]
        found = os.pathsep.join(path for path in sys.path if path)  # it imports what this process does
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": found}, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def end(self) -> int:
        """Ends the process, and returns its exit status, below 0 the signal that killed it."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(1)
        self.process.kill()
        return self.process.wait()


def parts(format: str, path: epath.Path, options: Options) -> list[Part]:
    """Returns the parts of a source; see the `parts` of its reader.

    Raises:
      FileNotFoundError, ValueError: see there; or the process died, or needed more than SECONDS or MEMORY.
    """
    if format not in FORMATS:
        return reader(format).parts(path, options)
    try:
        return [Part(*found) for found in _answers("parts", format, os.fspath(path), options)]
    except EOFError as error:
        raise ValueError(f"{path} cannot be read: {error}; give its files one by one to find which") from None


def entries(format: str, part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the entries of a part; see the `read` of its reader. If the process dies, one Rejected is for the rest."""
    if format not in FORMATS:
        yield from reader(format).read(part, options)
        return
    number = 0
    try:
        for found in _answers("read", format, part, options):
            yield unpack(found) if isinstance(found, bytes) else Rejected(*found)
            number += 1
    except EOFError as error:
        key = f"{epath.Path(part.path).name}/{part.start}+{number}"
        yield Rejected(part.path, key, f"{error}: this entry and what follows it in the part are left out")


def _answers(call: str, format: str, what: Any, options: Options) -> Iterator[Any]:
    """Yields what a process answers; raises EOFError, which says why, if it dies."""
    running = [child for child in _idle if child.process.poll() is None]
    _idle.clear()
    child = running[0] if running else _Child()
    try:
        child.connection.send_bytes(msgpack.packb((call, format, what, dataclasses.astuple(options), SECONDS, MEMORY)))
        while (answer := msgpack.unpackb(child.connection.recv_bytes()))[0] == "entry":
            yield answer[1]
    except (EOFError, ConnectionError):
        status = child.end()
        raise EOFError(
            f"it needs more than {SECONDS} s of processor time"
            if status == -signal.SIGXCPU
            else f"the process that read it ended with status {status}, as when memory is short"
        ) from None
    except GeneratorExit:
        child.end()
        raise
    _idle.append(child)
    if answer[0] != "done":
        raise (FileNotFoundError if answer[0] == "missing" else ValueError)(answer[1])


def _serve(connection: Connection) -> None:
    """Answers until the other side closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the other one ends this
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            for answer in _answered(*msgpack.unpackb(connection.recv_bytes())):
                connection.send_bytes(msgpack.packb(answer))


def _answered(call: str, format: str, what: Any, options: list, seconds: int, memory: int) -> Iterator[tuple[str, Any]]:
    """Yields ("entry", content) for each part or entry, then ("done", None), or what went wrong."""
    made = Options(*(tuple(value) if isinstance(value, list) else value for value in options))
    module = reader(format)  # its libraries take no memory that a file is allowed
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    try:
        _allow(seconds)
        found = module.parts(epath.Path(what), made) if call == "parts" else module.read(Part(*what), made)
        for entry in found:
            yield "entry", pack(entry) if isinstance(entry, Record) else entry
            _allow(seconds)
    except FileNotFoundError as error:
        yield "missing", str(error)
    except (ValueError, OSError) as error:
        yield "failed", str(error)
    except Exception as error:
        yield "failed", f"{type(error).__name__}: {error}"
    else:
        yield "done", None


def _allow(seconds: int) -> None:
    """Lets the process use so much more processor time; the system then ends it."""
    limit = int(time.process_time()) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
