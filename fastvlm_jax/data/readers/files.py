"""Reads the files that a source names, only inside their folder and only whole, and lines of bounded length.

The source may be hostile: it may name `../../etc/passwd`, a link out of the folder, or a pipe that never ends.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from fastvlm_jax.data.readers import Options
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.image_names import inside, is_on_windows, near, readings
from fastvlm_jax.images.header import MAX_BYTES as MAX_IMAGE_BYTES

MAX_RECORD_BYTES = 1 << 30  # bytes of all images of one record
MAX_KEY = 100  # characters of the name in a key; the digest covers the rest of the name too
VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv", ".m4v")
MAX_WIDE_BYTES = 512 << 20  # bytes of a list in UTF-16 or UTF-32, which is recoded in memory
_SKIP = 1 << 20  # bytes read at a time while a line that is too long is skipped
# Mark at the beginning of a file -> encoding. The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


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
    return path.is_file() if _is_remote(path) else os.path.isfile(path)


def _named(path: epath.Path, suffixes: tuple[str, ...]) -> bool:
    # macOS leaves hidden files beside the real ones.
    return path.name.lower().endswith(suffixes) and not path.name.startswith(".")


class ImagesFolder(NamedTuple):
    """Describes where the images are that a list names.

    Attributes:
      roots: folders, local or gs://; a name is looked up in each in turn.
      follow_links: whether links may lead out of them.
      link_mend: what the user can do about a link that leads out, for the error message.
    """

    roots: tuple[epath.Path, ...]
    follow_links: bool = False
    link_mend: str = "pass --follow_links, or name the folder that it leads to with one more --images"

    def __str__(self) -> str:
        return " or ".join(map(os.fspath, self.roots))


def check_images_folder(options: Options) -> None:
    """Raises FileNotFoundError if `options.images` names a folder that does not exist."""
    for root in options.roots:
        if not epath.Path(root).expanduser().is_dir():
            raise FileNotFoundError(f"there is no folder of images {root}")


def images_folder(path: epath.Path, options: Options) -> ImagesFolder:
    """Returns where the images are that the file `path` names: in the folders of the options, or beside the file."""
    roots = tuple(epath.Path(root).expanduser() for root in options.roots) or (path.parent,)
    return ImagesFolder(roots, options.follow_links)


def read_image(folder: ImagesFolder, name: str) -> bytes:
    """Returns the bytes of the file that a list calls `name`: in the first root that has it, local or gs://.

    The name as it stands is looked up first, then what else it may mean (image_names.py).

    Raises:
      ValueError: `name` is an address or a video, leads out of the folder, or is no file, an empty file, or a file over
        MAX_IMAGE_BYTES; the message is a short line.
    """
    meant = readings(name)
    if any(not path.strip() or "\0" in path or path.endswith("/") for path in meant):
        raise ValueError(f"{shown(name)} is not the name of a file")
    if name.startswith("data:") or ("://" in meant[0] and not _leads_inside(folder, meant[0])):
        raise ValueError(f"{shown(name)} is an address, not a file: download the images first")
    if meant[-1].lower().endswith(VIDEO):
        raise ValueError(f"{shown(name)} is a video")
    broken = None
    for path in meant:
        for root in folder.roots:
            try:
                if inner := inside(_paths(root), path):
                    return checked(_read(folder, root, inner, name), name)
            except FileNotFoundError:
                continue
            except OSError as error:
                broken = broken or error
    if broken:
        raise ValueError(f"{shown(name)} cannot be read ({broken.strerror or type(broken).__name__})")
    raise ValueError(_why_missing(folder, name, meant))


def _leads_inside(folder: ImagesFolder, path: str) -> bool:
    return any(inside(_paths(root), path) for root in folder.roots)


def _why_missing(folder: ImagesFolder, name: str, meant: list[str]) -> str:
    """Returns why there is no file `name`, and which file may be meant."""
    if is_on_windows(meant[0].strip()):
        return f"{shown(name)} is a path on a disk of Windows: names must be relative to the images' folder {folder}"
    if not all(_leads_inside(folder, path) for path in meant):
        return f"{shown(name)} leads out of the images' folder: names must be relative to it"
    for root in (root for root in folder.roots if not _is_remote(root)):
        inner = inside(_paths(root), meant[-1]) or ""
        path = os.path.join(_paths(root)[-1], inner)
        if inner and (real := os.path.realpath(path)) != path:
            return f"{shown(name)} leads through a link to {shown(real)}, where there is no file"
        for other in near(inner):
            if os.path.isfile(os.path.join(_paths(root)[-1], other)):
                return f"{shown(name)} is not in {root}, but {shown(other)} is: write the name that the file has"
    also = f", nor is {shown(meant[-1])}" if meant[-1] != name else ""
    return f"{shown(name)} is not in {folder}{also}"


def checked(data: bytes, name: str) -> bytes:
    """Returns `data`; raises ValueError, which names `name`, if it is empty or over MAX_IMAGE_BYTES."""
    if not data:
        raise ValueError(f"{shown(name)} is empty (0 bytes)")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{shown(name)} is over {MAX_IMAGE_BYTES >> 20} MB")
    return data


def _read(folder: ImagesFolder, root: epath.Path, inner: str, name: str) -> bytes:
    """Returns the contents of a file; of a file in a bucket, at most the first MAX_IMAGE_BYTES + 1 bytes."""
    if _is_remote(root):
        with (root / inner).open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    path = os.path.realpath(os.path.join(_paths(root)[-1], inner))
    if not folder.follow_links and not any(path.startswith(os.path.join(_paths(r)[-1], "")) for r in folder.roots):
        raise ValueError(f"{shown(name)} is a link out of the images' folder: {folder.link_mend}")
    # Opening a device may already act on it.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{shown(name)} is not a regular file")
    # Without O_NONBLOCK, opening a named pipe, put there since, waits forever for a writer.
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


def _is_remote(root: epath.Path) -> bool:
    return "://" in os.fspath(root)


@functools.lru_cache(maxsize=64)
def _paths(root: epath.Path) -> tuple[str, ...]:
    """Returns the paths that a folder is known by: its address, or its absolute path and, last, that without links."""
    path = os.fspath(root)
    return (path.rstrip("/"),) if _is_remote(root) else (os.path.abspath(path), os.path.realpath(path))


def key_of(name: str, entry: bytes) -> str:
    """Returns a record's key: its name in the source and a digest of the entry.

    Published names repeat: some 250,000 entries of the 665K set are named by the COCO number of an image that another
    entry is about too. The digest tells such entries apart; an entry that is repeated as a whole has the same key.
    """
    name = "".join(char if char.isprintable() else "?" for char in name[:MAX_KEY])
    return f"{name}#{hashlib.blake2b(entry, digest_size=8).hexdigest()}"


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[IO[bytes]]:
    """Yields a list as a file of UTF-8 bytes: as it is, or recoded if it begins with the mark of UTF-16 or UTF-32.

    Raises:
      ValueError: the file is over MAX_WIDE_BYTES in UTF-16 or UTF-32, or broken.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        encoding = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
        yield file if encoding is None else io.BytesIO(_recoded(file, path, encoding))


def _recoded(file: IO[bytes], path: epath.Path, encoding: str) -> bytes:
    data = file.read(MAX_WIDE_BYTES + 1)
    if len(data) > MAX_WIDE_BYTES:
        raise ValueError(f"{path} is over {MAX_WIDE_BYTES >> 20} MB in {encoding}: save it as UTF-8")
    try:
        # Half a surrogate pair costs its entry, not the file.
        return data.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is cut or broken {encoding} at byte {error.start}: save it as UTF-8") from None


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


def objects(path: epath.Path, limit: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of the line, object) of a file of JSON lines; empty lines do not count.

    Raises:
      ValueError: a line has more than `limit` bytes or holds no object; the message names the file and the line.
    """
    with path.open("rb") as file:
        for number, (_, line) in enumerate(lines(file, limit), 1):
            if line is None:
                raise ValueError(f"{path} line {number} has more than {limit:,} bytes")
            if not line.strip():
                continue
            try:
                row = loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} holds no object")
            yield number, row


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
