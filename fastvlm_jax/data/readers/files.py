"""Files that a source names: opened only inside their folder, whole or not at all; and lines of bounded length.

Whoever wrote the source may be hostile: `../../etc/passwd`, a link out of the folder, a pipe that never ends.
"""

import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from fastvlm_jax.data.readers import Options
from fastvlm_jax.data.readers.conversations import shown

MAX_IMAGE_BYTES = 256 << 20
MAX_RECORD_BYTES = 1 << 30  # all images of one record
MAX_KEY = 100  # characters; what is cut off still counts in the digest
VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv", ".m4v")
_SKIP = 1 << 20


def listed(path: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    """Returns `path` itself if it is a file, or the files in that folder whose names end so, by name.

    Raises:
      FileNotFoundError: there is nothing at `path`, or no such file in the folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if _is_file(path):
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")  # a pipe would be waited for
    found = sorted(child for child in path.iterdir() if _named(child, suffixes) and _is_file(child))
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no {' or '.join(suffixes)} file")
    return found


def looks_like(path: epath.Path, suffixes: tuple[str, ...]) -> bool:
    """Whether `path` is a file named so, or a folder with such a file in it; never raises."""
    try:
        return bool(listed(path, suffixes)) if path.is_dir() else _named(path, suffixes) and _is_file(path)
    except (OSError, ValueError):
        return False


def _is_file(path: epath.Path) -> bool:
    # To epath, pipes and devices are files.
    return path.is_file() if "://" in os.fspath(path) else os.path.isfile(path)


def _named(path: epath.Path, suffixes: tuple[str, ...]) -> bool:
    # Hidden files are what macOS leaves beside the real ones.
    return path.name.lower().endswith(suffixes) and not path.name.startswith(".")


def check_images_folder(options: Options) -> None:
    """Raises FileNotFoundError if the folder of images that was asked for is not there."""
    if options.images and not epath.Path(options.images).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder of images {options.images}")


def images_folder(path: epath.Path, options: Options) -> epath.Path:
    """Returns the folder that the image names in the file `path` start from."""
    return epath.Path(options.images).expanduser() if options.images else path.parent


def read_images(folder: epath.Path, names: list[str]) -> tuple[bytes, ...]:
    """Returns the bytes of several images of one record, as `read_image` does."""
    images, size = [], 0
    for name in names:
        images.append(read_image(folder, name))
        size += len(images[-1])
        if size > MAX_RECORD_BYTES:
            raise ValueError(f"its images are more than {MAX_RECORD_BYTES >> 20} MB together")
    return tuple(images)


def read_image(folder: epath.Path, name: str) -> bytes:
    """Returns the bytes of the file `name` in or below `folder`, local or gs://.

    Raises:
      ValueError: in a short line: the name leads out of the folder, or it is no file, empty, or over MAX_IMAGE_BYTES.
    """
    if not name or "\0" in name or name.endswith("/"):
        raise ValueError(f"{shown(name)} is not the name of a file")
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"{shown(name)} is an address, not a file: download the images first")
    if name.startswith(("/", "~")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"{shown(name)} leads out of the images' folder: names must be relative to it")
    if name.lower().endswith(VIDEO):
        raise ValueError(f"{shown(name)} is a video")
    try:
        data = _read(folder, name)
    except FileNotFoundError:
        raise ValueError(f"{shown(name)} is not in {folder}") from None
    except OSError as error:
        raise ValueError(f"{shown(name)} cannot be read ({error.strerror or type(error).__name__})") from error
    return checked(data, name)


def checked(data: bytes, name: str) -> bytes:
    """Returns `data`; ValueError if it is empty or over MAX_IMAGE_BYTES."""
    if not data:
        raise ValueError(f"{shown(name)} is empty (0 bytes)")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{shown(name)} is over {MAX_IMAGE_BYTES >> 20} MB")
    return data


def _read(folder: epath.Path, name: str) -> bytes:
    """The file's first MAX_IMAGE_BYTES + 1 bytes."""
    if "://" in os.fspath(folder):
        with (folder / name).open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    root = _real_root(os.fspath(folder))
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(os.path.join(root, "")):
        raise ValueError(f"{shown(name)} is a link out of the images' folder")
    # Without O_NONBLOCK, opening a named pipe waits for a writer for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"{shown(name)} is not a regular file")
        if state.st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"{shown(name)} is over {MAX_IMAGE_BYTES >> 20} MB")
        with open(handle, "rb", buffering=0, closefd=False) as file:
            return file.read(state.st_size)
    finally:
        os.close(handle)


@functools.lru_cache(maxsize=16)
def _real_root(folder: str) -> str:
    return os.path.realpath(folder)


def key_of(name: str, entry: bytes) -> str:
    """Returns a record's key: its name in the source and a digest of the entry.

    Published names repeat: the 665K set holds some 250,000 entries under the COCO number of an image that another
    entry is about. The same name and the same entry give the same key, which makes a true repetition visible.
    """
    name = "".join(char if char.isprintable() else "?" for char in name[:MAX_KEY])
    return f"{name}#{hashlib.blake2b(entry, digest_size=8).hexdigest()}"


def lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (length in the file, line without its end) from where `file` stands; None for one over `limit` bytes."""
    while line := file.readline(limit + 2):
        length = len(line)
        if length > limit and not line.endswith(b"\n"):
            while more := file.readline(_SKIP):
                length += len(more)
                if more.endswith(b"\n"):
                    break
            yield length, None
        else:
            yield length, line.rstrip(b"\r\n")


def loads(raw: bytes) -> Any:
    """Returns the JSON value in UTF-8 bytes; ValueError, in a short line, where there is none."""
    try:
        return json.loads(raw.decode("utf-8-sig"), strict=False, parse_int=whole_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start} of it)") from error
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error


def whole_number(digits: str) -> int | str:
    """Returns the number, or its digits where msgpack has no room for it (and `int` may refuse it)."""
    return int(digits) if len(digits) < 20 else digits
