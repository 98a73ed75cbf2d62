"""Watches what a process does to files and to other programs, by Python's audit hooks."""

import os
import pathlib
import sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 1,
    "os.chmod": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 0,
}  # fmt: skip
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect",
            "pickle.find_class", "ctypes.dlopen")  # fmt: skip
FORBIDDEN = ("/etc/passwd", "/proc/self/environ", ".ssh", "/outside/")  # what no stranger's file may make it read


class Watch:
    """Collects, while it is entered, what is done outside a folder: files written, programs started, secrets read.

    Attributes:
      found: events, in words.
    """

    def __init__(self, folder: pathlib.Path):
        self.found: list[str] = []
        self._folder, self._on = str(folder), False
        sys.addaudithook(self._hook)  # for good: hooks cannot be removed

    def __enter__(self):
        self._on = True
        return self

    def __exit__(self, *error):
        self._on = False

    def _hook(self, event: str, args: tuple) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes | os.PathLike):
                path = os.path.abspath(os.fsdecode(path))
                if flags & WRITES and not path.startswith((self._folder, "/dev/null", "/proc/self")):
                    self.found.append(f"written: {path}")
                if any(name in path for name in FORBIDDEN):
                    self.found.append(f"read: {path}")
        elif event in CHANGES and not (isinstance(args[-1], int) and args[-1] >= 0 and event != "os.chmod"):
            # Paths that are relative to an open folder come from shutil.rmtree, which is told of itself.
            for path in args[: CHANGES[event]]:
                if isinstance(path, str | bytes | os.PathLike) and not self._inside(path):
                    self.found.append(f"{event}: {path}")
        elif event in PROGRAMS:
            self.found.append(f"{event}: {str(args)[:200]}")

    def _inside(self, path) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self._folder)
