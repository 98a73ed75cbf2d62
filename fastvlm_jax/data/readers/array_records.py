"""Reads the entries of an ArrayRecord file one by one, so that a damaged entry does not cost the others."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[str]:
    """Yields the name of a local file with the contents of `path`; a file in a bucket is copied for the block."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, path.name)
        with path.open("rb") as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def entries(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes | None, str]]:
    """Yields (number, bytes, "") for each entry in [start, stop), or (number, None, reason) if it cannot be read.

    If the file ends before entry `stop`, as one that was cut does, one last reason stands for all missing entries. If
    the file cannot be opened, its reason is all that is yielded.

    Raises:
      FileNotFoundError: `path` does not exist.
    """
    if not epath.Path(path).exists():  # ArrayRecordReader would take it for an empty file
        raise FileNotFoundError(f"there is no file {path}")
    with local_copy(epath.Path(path)) as name:
        try:
            reader = ArrayRecordReader(name, "readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
            count = reader.num_records()
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            yield start, None, f"the file cannot be read: {_line(error)}"
            return
        try:
            for number in range(start, min(stop, count)):
                try:
                    (data,) = reader.read([number])
                except (RuntimeError, ValueError, IndexError, MemoryError) as error:
                    yield number, None, f"the entry is damaged: {_line(error)}"
                else:
                    yield number, data, ""
            if count < stop:
                first = max(start, count)
                yield first, None, f"entries {first} to {stop - 1} are missing: the file is cut short or damaged"
        finally:
            with contextlib.suppress(RuntimeError):  # closing repeats an error that was already reported
                reader.close()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
