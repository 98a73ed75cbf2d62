"""The entries of an ArrayRecord file, each on its own: a damaged one does not cost the others."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[str]:
    """The name of a local file with the contents of `path`; one in a bucket is copied for as long as it is read."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, path.name)
        with path.open("rb") as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def entries(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes | None, str]]:
    """Yields (number, bytes, "") of the entries [start, stop), or (number, None, what is wrong with it).

    A file of fewer entries, as one that was cut, ends with one such line.

    Raises:
      FileNotFoundError: no such file.
    """
    if not epath.Path(path).exists():  # the reader would find it empty
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
            with contextlib.suppress(RuntimeError):  # it repeats what was told
                reader.close()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
