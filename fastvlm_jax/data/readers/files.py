"""Reads the files that a source names, only inside their folder and only whole, and lines of bounded length.

The source may be hostile: it may name `../../etc/passwd`, a link out of the folder, or a pipe that never ends.
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

MAX_IMAGE_BYTES = 256 << 20  # bytes of one encoded image
MAX_RECORD_BYTES = 1 << 30  # bytes of all images of one record
MAX_KEY = 100  # characters of the name in a key; the digest covers the rest of the name too
VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv", ".m4v")
_SKIP = 1 << 20  # bytes read at a time while a line that is too long is skipped


def listed(path: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    """Returns `path` itself if it is a file; for a folder, the files in it that end in one of `suffixes`, by name.

    Raises:
      FileNotFoundError: `path` does not exist, is neither a file nor a folder, or is a folder without such a file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if _is_file(path):
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")  # opening a pipe would wait forever
    found = sorted(child for child in path.iterdir() if _named(child, suffixes) and _is_file(child))
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no {' or '.join(suffixes)} file")
    return found


def looks_like(path: epath.Path, suffixes: tuple[str, ...]) -> bool:
    """Returns whether `path` is a file that ends in one of `suffixes`, or a folder with one in it; never raises."""
    try:
        return bool(listed(path, suffixes)) if path.is_dir() else _named(path, suffixes) and _is_file(path)
    except (OSError, ValueError):
        return False


def _is_file(path: epath.Path) -> bool:
    # epath takes pipes and devices for files.
    return path.is_file() if "://" in os.fspath(path) else os.path.isfile(path)


def _named(path: epath.Path, suffixes: tuple[str, ...]) -> bool:
    # macOS leaves hidden files beside the real ones.
    return path.name.lower().endswith(suffixes) and not path.name.startswith(".")


def check_images_folder(options: Options) -> None:
    """Raises FileNotFoundError if `options.images` names a folder that does not exist."""
    if options.images and not epath.Path(options.images).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder of images {options.images}")


def images_folder(path: epath.Path, options: Options) -> epath.Path:
    """Returns the folder that the image names in the file `path` are relative to."""
    return epath.Path(options.images).expanduser() if options.images else path.parent


def read_images(folder: epath.Path, names: list[str]) -> tuple[bytes, ...]:
    """Returns the bytes of all images of one record, read by `read_image`.

    Raises:
      ValueError: as in `read_image`, or the images are over MAX_RECORD_BYTES together.
    """
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
      ValueError: `name` is an address or a video, leads out of the folder, or is no file, an empty file, or a file over
        MAX_IMAGE_BYTES; the message is a short line.
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
    """Returns `data`; raises ValueError, which names `name`, if it is empty or over MAX_IMAGE_BYTES."""
    if not data:
        raise ValueError(f"{shown(name)} is empty (0 bytes)")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{shown(name)} is over {MAX_IMAGE_BYTES >> 20} MB")
    return data


def _read(folder: epath.Path, name: str) -> bytes:
    """Returns the contents of a file; of a file in a bucket, at most the first MAX_IMAGE_BYTES + 1 bytes."""
    if "://" in os.fspath(folder):
        with (folder / name).open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    root = _real_root(os.fspath(folder))
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(os.path.join(root, "")):
        raise ValueError(f"{shown(name)} is a link out of the images' folder")
    # Without O_NONBLOCK, opening a named pipe waits forever for a writer.
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

    Published names repeat: some 250,000 entries of the 665K set are named by the COCO number of an image that another
    entry is about too. The digest tells such entries apart; an entry that is repeated as a whole has the same key.
    """
    name = "".join(char if char.isprintable() else "?" for char in name[:MAX_KEY])
    return f"{name}#{hashlib.blake2b(entry, digest_size=8).hexdigest()}"


def lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (bytes in the file, line without its end) from the current position on.

    A line of more than `limit` bytes is None.
    """
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
    """Returns the JSON value in UTF-8 bytes; raises ValueError, with a short line, if there is none."""
    try:
        return json.loads(raw.decode("utf-8-sig"), strict=False, parse_int=whole_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at its byte {error.start})") from error
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error


def whole_number(digits: str) -> int | str:
    """Returns the number; its digits if there are 20 or more, which msgpack cannot store and `int` may refuse."""
    return int(digits) if len(digits) < 20 else digits
