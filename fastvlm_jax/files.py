"""Reads and writes JSON and files, complete or not at all; appends; gzip; checksums; the user's cache folder."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from etils import epath

POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer of Git LFS begins
# Bytes of a small file of a model or data set. Qwen2's tokenizer.json has 7 MB, Llama 3's 17. Hostile JSON takes 20
# times as much memory once it is parsed.
MAX_SMALL = 64 << 20


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON object in `path`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file holds something else, or more than MAX_SMALL bytes; the message names it.
    """
    data = read_small(path)
    if data.startswith(POINTER):
        raise ValueError(pointer_message(path))
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: copy or export it again")
    return content


def read_small(path: os.PathLike, limit: int = MAX_SMALL) -> bytes:
    """Returns the contents of a file that other people may have written.

    Args:
      path: a Path of pathlib or of epath.
      limit: most bytes that the file may have.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is larger; the message names it.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is over {limit >> 20} MB, far more than such a file holds: copy or export it again")
    return data


def gunzip(data: bytes, limit: int) -> bytes:
    """Returns what one member of gzip holds.

    Args:
      limit: most bytes that it may unpack to.

    Raises:
      ValueError: the gzip is damaged, cut, followed by more, or unpacks to more; the message does not name the file.
    """
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        unpacked = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"its gzip is damaged ({error})") from error
    if len(unpacked) > limit:
        raise ValueError(f"it is over {limit >> 20} MB")
    if not stream.eof or stream.unused_data:
        raise ValueError("the gzip is cut" if not stream.eof else "bytes follow the gzip")
    return unpacked


def refuse_pointer(path: os.PathLike) -> None:
    """Raises ValueError if a file is a pointer of Git LFS, which a clone leaves where the content was not fetched."""
    with epath.Path(path).open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(pointer_message(path))


def pointer_message(path: os.PathLike | str) -> str:
    """Returns the error message that refuses a pointer of Git LFS and says how to get the content."""
    return f"{path} is a Git LFS pointer and not the content: run `git lfs pull` in its folder, or download it again"


# What a write leaves that was killed, for pathlib's glob: a name, eight characters at random, ".partial".
PARTIALS = "*.????????.partial"


@contextlib.contextmanager
def whole_file(path: os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a file that gets the name `path` if the block succeeds, and is removed if it fails.

    Several hosts may write the same file: each writes to a name of its own, PATH.*.partial, and the last one wins.
    """
    path = pathlib.Path(path)
    with tempfile.NamedTemporaryFile(
        mode, dir=path.parent, prefix=f"{path.name}.", suffix=".partial", delete=False
    ) as file:
        try:
            yield file
            file.close()
            os.chmod(file.name, 0o644)
            put_in_place(pathlib.Path(file.name), path)
        except BaseException as error:
            os.unlink(file.name)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = os.fspath(path)  # the system's error of a full disk names no file
            raise


def put_in_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a written file once its contents have reached the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: os.PathLike, data: bytes) -> None:
    """Writes a file that appears under its name only when it is complete; makes its folder if needed."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)


def write_json(path: os.PathLike, content: Any, *, sort_keys: bool = False) -> None:
    """Writes JSON with an indent of 2; see `write_whole`."""
    write_whole(path, (json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode())


def append(path: os.PathLike, data: bytes) -> None:
    """Appends to a file all of `data` or, if that fails, nothing; makes the file, but not its folder.

    Raises:
      OSError: the disk does not take it; the error names the file.
    """
    end = None
    try:
        with open(path, "ab", buffering=0) as file:
            end, left = file.tell(), memoryview(data)
            while left:
                left = left[file.write(left) :]
    except OSError as error:  # a network file system may raise it when the file is closed
        if end is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, end)
        error.filename = os.fspath(path)
        raise


def save_arrays(path: os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file that appears only when it is complete; its folder must exist."""
    with whole_file(path) as file:
        np.savez(file, **arrays)


def load_arrays(path: os.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads arrays that `save_arrays` wrote; nothing is unpickled, and nothing unpacked.

    Arrays take no more memory than the file has bytes, for none may be compressed.

    Raises:
      ValueError: the file is damaged, compressed, or lacks an array; the message does not name it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {name: archive.getinfo(f"{name}.npy") for name in names}
            if packed := [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{packed[0]} is compressed")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in entries}
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many kinds
        raise ValueError(f"{type(error).__name__} {error}".splitlines()[0]) from error


def sha256(path: os.PathLike) -> str:
    """Returns the SHA-256 of a file's contents, hexadecimal; `path` is a Path of pathlib or of epath."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(content: Any) -> str:
    """Returns the SHA-256 of a JSON value, hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cache_folder() -> pathlib.Path:
    """Returns the folder for files that can be computed again: $FASTVLM_CACHE, else ~/.cache/fastvlm_jax."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastvlm_jax"
    return pathlib.Path(os.environ.get("FASTVLM_CACHE") or default).expanduser()
