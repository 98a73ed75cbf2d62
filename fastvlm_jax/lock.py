"""Keeps two processes from work in one folder, also where hosts share it over a network file system.

FOLDER/lock     {"host": "t1v-n-0", "boot": "0b8e...", "pid": 4711, "since": "2026-11-27 03:10:22 UTC"}; empty = free

Whether the owner lives, two things tell. On its own machine the kernel does: the file is locked (flock) until the last
process that holds it has ended, however it ended. A lock of another machine may not reach this one (gcsfuse, some NFS),
so the owner touches the file every BEAT_SECONDS. Whoever wants the folder watches it, by its own clock, for no clocks
of two hosts agree: a touched file is refused, one that nobody touches for STALE_SECONDS is taken over. The owner looks
at every beat whether the file is still its own; see `Lock.check`.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from fastvlm_jax import disk
from fastvlm_jax.files import append

LOCK = "lock"  # file in the folder
WAIT_SECONDS = 3  # for a process that was just stopped to end
BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0  # gcsfuse and NFS may show a touched file up to a minute late
# How file systems say that they lock nothing.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """Holds the lock of a folder; see `locked`.

    Attributes:
      descriptor: of the file; a child that inherits it holds the lock too.
    """

    def __init__(self, path: pathlib.Path, descriptor: int, content: bytes):
        self.descriptor = descriptor
        self._path, self._content, self._lost, self._ended = path, content, "", threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises OSError if the folder has vanished or another process has taken it; costs nothing."""
        if self._lost:
            raise OSError(self._lost)

    def end(self) -> None:
        """Stops the beats, and frees the folder if it is still this process's."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        if self._thread.is_alive():  # the file system hangs; the run has ended all the same
            return
        self._beat()
        if not self._lost:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)

    def _watch(self) -> None:
        """Runs in a thread until the end, or until the folder is lost."""
        while not self._lost and not self._ended.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        """Touches the file if it is still this process's; a failing disk is told by whoever writes to it."""
        with contextlib.suppress(OSError):
            try:
                content = self._path.read_bytes()
            except FileNotFoundError:
                self._lost = f"{self._path} has vanished: nothing more can be saved in its folder"
                return
            if content == self._content:
                os.utime(self._path)
            else:
                self._lost = f"{self._path.parent} was taken by {who(content)}: only one of two can go on there"


@contextlib.contextmanager
def locked(folder: pathlib.Path, work: str) -> Iterator[Lock]:
    """Keeps other processes out of a folder within the block; the folder is made if there is none.

    Args:
      work: who does what there, for messages: "another sweep is at work".

    Raises:
      ValueError: another process holds the folder; the message names it.
      OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+b", buffering=0) as file:
        _take(path, file, work)
        owner = {**_machine(), "pid": os.getpid(), "since": f"{datetime.datetime.now(datetime.UTC):%F %T} UTC"}
        content = json.dumps(owner).encode()
        file.truncate(0)
        append(path, content)
        lock = Lock(path, file.fileno(), content)
        try:
            yield lock
        finally:
            lock.end()


def who(content: bytes) -> str:
    """Returns in words which process a lock's content names."""
    owner = _read(content)
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"


def _take(path: pathlib.Path, file: IO[bytes], work: str) -> None:
    """Returns once the folder is free, or its owner has ended.

    Raises:
      ValueError: the owner lives.
    """
    end = time.monotonic() + WAIT_SECONDS
    while (free := _flock(file)) is False:
        if time.monotonic() > end:
            raise ValueError(_refusal(path, work))
        time.sleep(0.1)
    content = path.read_bytes()
    owner = _read(content)
    if not owner:
        return
    if free and {key: owner.get(key) for key in _machine()} == _machine():
        disk.tell(f"{path} is of {who(content)}, which has ended: taken over")
        return
    disk.tell(f"{path} is of {who(content)}: watching for {STALE_SECONDS:g} s whether it lives")
    before, end = _stamp(path), time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT_SECONDS))
        if _stamp(path) != before:
            raise ValueError(_refusal(path, work))
    disk.tell(f"{path} was not touched for {STALE_SECONDS:g} s: taken over")


def _flock(file: IO[bytes]) -> bool | None:
    """Locks the file: True; False if another process holds it; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


def _refusal(path: pathlib.Path, work: str) -> str:
    return f"{work} in {path.parent}: {who(path.read_bytes())} (or what it started); wait for its end, or stop it"


def _stamp(path: pathlib.Path) -> tuple[int, bytes]:
    """Returns what a beat or another owner changes; opens the file, as NFS looks anew when a file is opened."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns, file.read()


def _read(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content or b"{}")
    except ValueError:  # a crash in the middle of writing, or not ours
        return {"host": "?"}
    return owner if isinstance(owner, dict) else {"host": "?"}


def _machine() -> dict[str, str]:
    """Returns what tells machines apart: containers of one have names of their own, and may not see each other."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")  # Linux
    return {"host": platform.node(), "boot": boot.read_text().strip() if boot.exists() else ""}
