"""Reads the list of records that a write leaves out, as `fastvlm data inspect --against` writes it."""

import functools
import os

from etils import epath

from fastvlm_jax.data.readers import files
from fastvlm_jax.files import refuse_pointer

MARK = "left out by --exclude"  # how the reason of such an entry begins in rejected.jsonl
_MAX_LINE = 1 << 20  # bytes


def read_excluded(path: str) -> dict[str, str]:
    """Returns the key of each listed record -> why it is left out, by its first line in the list.

    Args:
      path: file of JSON lines; each holds an object with the "key" of a record, all else may be missing.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line holds no such object; the message names it.
    """
    try:
        state = os.stat(os.path.expanduser(path))
        return _read(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise FileNotFoundError(f"--exclude {path} cannot be read: {error.strerror or error}") from error


@functools.lru_cache(maxsize=2)  # every record is looked up
def _read(path: str, *_version: int) -> dict[str, str]:
    found: dict[str, str] = {}
    file = epath.Path(path).expanduser()
    try:
        refuse_pointer(file)
        for number, entry in files.objects(file, _MAX_LINE):
            if not isinstance(entry.get("key"), str):
                raise ValueError(f'{path} line {number} has no "key" of a record')
            what = ", ".join(str(entry[name])[:100] for name in ("kind", "benchmark", "row") if entry.get(name))
            found.setdefault(entry["key"], f"{MARK}: {what}" if what else MARK)
    except ValueError as error:
        raise ValueError(f"--exclude {error}: the list is what `fastvlm data inspect --against` writes") from error
    return found
