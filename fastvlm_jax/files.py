"""Files on this machine: JSON objects, files that appear whole, checksums, the user's cache folder."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming the file, where it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: copy or export it again")
    return content


def cache_folder() -> pathlib.Path:
    """Where what can be computed again is kept: $FASTVLM_CACHE, else fastvlm_jax in the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastvlm_jax"
    return pathlib.Path(os.environ.get("FASTVLM_CACHE") or default).expanduser()


def save_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file that appears whole, whichever of several hosts writes it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".partial", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def put_in_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a written file when it has reached the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that appears under its name only whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
