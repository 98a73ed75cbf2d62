"""Appends a run's rows to a file; a failing disk costs neither the run nor its rows."""

import pathlib

from fastvlm_jax import disk, files


class LogFile:
    """Appends rows to a file. A training state is worth more than its log, so a disk that fails is told in a line, and
    the run goes on: the rows wait in memory and are written, in order, as soon as the disk takes them.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._waiting = path, b""
        self._error: OSError | None = None

    def append(self, rows: bytes) -> None:
        """Writes whole rows, behind those that wait."""
        self._waiting += rows
        try:
            files.append(self._path, self._waiting)
        except OSError as error:
            if self._error is None or self._error.errno != error.errno:
                disk.tell(f"{disk.describe(error)}; the run goes on, and what is missing there is written later")
            self._error = error
            return
        if self._error is not None:
            disk.tell(f"{self._path} is written to again, nothing is missing")
        self._waiting, self._error = b"", None

    def flush(self) -> None:
        """Tries once more to write the rows that wait.

        Raises:
          OSError: the disk still fails.
        """
        if self._waiting:
            self.append(b"")
        if self._error is not None:
            raise self._error
