"""Opens the folder that a command writes to: it is local, and one process writes to it at a time."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator

from fastvlm_jax import lock


def local_folder(output: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a folder to write to; raises ValueError if it is in a bucket, or a file."""
    if "://" in os.fspath(output):
        raise ValueError(
            f"{output} is not local: write to a local folder, then `gcloud storage cp --recursive FOLDER {output}`"
        )
    output = pathlib.Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: choose a folder")
    return output


@contextlib.contextmanager
def locked(output: pathlib.Path) -> Iterator[None]:
    """Makes a folder if there is none, and keeps other processes from writing to it while the block runs.

    Raises:
      OSError: the folder cannot be written to.
      ValueError: another process is writing to it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"{output} cannot be written to: {error.strerror or error}") from error
    try:
        with contextlib.suppress(PermissionError):  # some network file systems cannot lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another process is writing to {output}: wait for it") from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_for_hosts(output: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Keeps processes of other hosts from a folder that they share; yields a check that this process still has it."""
    with lock.locked(output, "another process is writing") as held:
        yield held.check
        held.check()
        (output / lock.LOCK).unlink()
