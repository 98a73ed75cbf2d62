"""Reads CSV and TSV lists of image paths and captions, the form in which CC3M, CC12M and their recaptions are shared.

    image,caption                  a header names the columns, as columns.py knows them;
    0001.jpg,"a dog, running"      without a header there are two columns, the image first

A .tsv has one row a line, and quotes in it are text unless they enclose the whole field. Either name may end in `.gz`.
A part is a range of bytes of the (unpacked) file that begins and ends at the beginning of a row.
"""

import contextlib
import csv
import gzip
import itertools
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from etils import epath

from fastvlm_jax.data.readers import Options, Part, columns
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.files import (
    check_images_folder,
    images_folder,
    key_of,
    lines,
    listed,
    looks_like,
    opened,
)
from fastvlm_jax.data.readers.rows import row_record
from fastvlm_jax.data.record import Record, Rejected

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_ADDRESSES = ("url", "urls", "image_url", "image_urls", "img_url")
MAX_LINE = 1 << 20  # bytes
MAX_ROW_LINES = 32  # a quoted caption may hold newlines, but a quote that is never closed must not swallow the file
PART_ROWS = 20_000
PART_ROWS_GZ = 500_000  # more, because a .gz is unpacked from its beginning for every part


class _Columns(NamedTuple):
    names: list[str]
    header: int  # first byte of the header; -1 without one


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a .csv or .tsv file, perhaps with .gz, or a folder with one in it."""
    return looks_like(path, SUFFIXES)


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns the parts of a file, or of all such files in a folder; each file is read once to find them.

    Raises:
      FileNotFoundError: `path` or `options.images` does not exist, or `path` is a folder without such files.
      ValueError: a file has no columns that a record can be made from.
    """
    check_images_folder(options)
    found = []
    for file in listed(path, SUFFIXES):
        head, length = _columns(file), PART_ROWS_GZ if _is_gz(file) else PART_ROWS
        if head is None:
            continue
        starts = [row.at for i, row in enumerate(_rows(file, 0, head)) if i % length == 0]
        # The last part has no end, so that its reader meets the damage that ended the rows, if any.
        found += [
            Part(str(file), start, stop) for start, stop in itertools.zip_longest(starts, starts[1:], fillvalue=-1)
        ]
    return found


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the records of a part in order; an unusable row is a Rejected, named by its key or first byte."""
    path = epath.Path(part.path)
    folder = images_folder(path, options)
    seen: dict[str, int] = {}
    try:
        head = _columns(path)
        for row in _rows(path, part.start, head):
            if part.stop >= 0 and row.at >= part.stop:
                return
            key = f"byte {row.at}"
            try:
                if row.wrong:
                    raise ValueError(row.wrong)
                if len(row.fields) != len(head.names):
                    raise ValueError(f"the row has {len(row.fields)} columns in place of {len(head.names)}")
                cells = dict(zip(head.names, (field.strip() or None for field in row.fields), strict=True))
                key = _key(cells, path)
                if key in seen:
                    raise ValueError(f"the same row stands at byte {seen[key]}")
                seen[key] = row.at
                yield row_record(key, cells, folder, options)
            except ValueError as error:
                yield Rejected(part.path, key, str(error))
    except (OSError, ValueError) as error:
        yield Rejected(part.path, f"byte {part.start}", f"the file has changed or cannot be read: {error}")


def _is_gz(path: epath.Path) -> bool:
    return path.name.lower().endswith(".gz")


def _columns(path: epath.Path) -> _Columns | None:
    """Returns the columns that the first row names; None for a file without rows."""
    row = next(_rows(path, 0, None), None)
    if row is None:
        return None
    if row.wrong:
        raise ValueError(f"the first row of {path} cannot be read: {row.wrong}")
    names = [field.strip() for field in row.fields]
    plan = _plan(names)
    named = [name for name in plan.named if name.lower() not in _ADDRESSES]
    addresses = any(name.lower() in _ADDRESSES or "://" in name for name in names)
    if addresses and not named and plan.kind in ("", "captions"):
        raise ValueError(
            f"{path} lists addresses, not files: download the images first, with img2dataset into .tar files"
        )
    if len({name.lower() for name in names}) < len(names) and plan.kind:
        raise ValueError(f"{path} has two columns of one name among {shown(', '.join(names))}: rename one of them")
    if plan.kind:
        return _Columns(names, row.at)
    if len(names) == 2 and not plan.named and not _plan([names[0], names[1], "image"]).kind:
        return _Columns(["image", "caption"], -1)
    raise ValueError(
        f"{path} has the columns {shown(', '.join(names))}: it needs one of image, path, filename ... and one of "
        "caption, text, title ..., or question and answer, or conversations (see docs/data.md); or just two columns, "
        "image and caption"
    )


def _plan(names: list[str]) -> columns.Plan:
    return columns.try_plan(dict.fromkeys(names, "text"))


def _key(cells: dict[str, str | None], path: epath.Path) -> str:
    """Returns the key of a row: the name of its image, else its id, and a digest of what is read from it."""
    plan = _plan(list(cells))
    images = [cells[name] for name in plan.named if cells[name]][:1]
    name = next(iter(images), None) or (plan.id and cells[plan.id]) or path.stem
    return key_of(name, "\t".join(images + [cells[name] or "" for name in plan.texts]).encode())


class _Row(NamedTuple):
    at: int  # first byte
    fields: list[str]
    wrong: str = ""  # why the row cannot be read


def _rows(path: epath.Path, start: int, head: _Columns | None) -> Iterator[_Row]:
    """Yields the rows from byte `start` of the unpacked file on, without the header; a broken row says why."""
    tabs = ".tsv" in path.name.lower()[-7:]
    at, pending = start, []  # lines read ahead: (length, line)
    with _open(path) as file:
        source = _lines_from(file, start)
        while pending or (line := next(source, None)):
            pending = pending or [line]
            row, used = _parse_tabs(pending) if tabs else _parse_commas(pending, source)
            if not (head and at == head.header) and (row.fields or row.wrong):
                yield row._replace(at=at)
            at += sum(length for length, _ in pending[:used])
            pending = pending[used:]


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[IO[bytes]]:
    with opened(path) as file:
        yield gzip.GzipFile(fileobj=file) if _is_gz(path) else file


def _lines_from(file: IO[bytes], start: int) -> Iterator[tuple[int, bytes | str]]:
    """Yields (length, line) from byte `start` on; in place of a line that cannot be read, a str that says why."""
    try:
        file.seek(start)
        for length, line in lines(file, MAX_LINE):
            yield length, f"the line is over {MAX_LINE >> 20} MB" if line is None else line
    except (EOFError, OSError, zlib.error) as error:
        yield 0, f"the file is cut or broken here: {error}"


def _text(line: bytes | str) -> str:
    """Returns the text of a line; raises ValueError if it has none."""
    if isinstance(line, str):
        raise ValueError(line)
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start} of the line)") from error


def _parse_tabs(pending: list[tuple[int, bytes | str]]) -> tuple[_Row, int]:
    try:
        text = _text(pending[0][1])
    except ValueError as error:
        return _Row(0, [], str(error)), 1
    return _Row(0, [_unquoted(field) for field in text.split("\t")] if text.strip() else []), 1


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    enclosed = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if enclosed else field


def _parse_commas(pending: list[tuple[int, bytes | str]], source: Iterator) -> tuple[_Row, int]:
    """Returns the row at the beginning of `pending` and its number of lines, 1 if it is broken.

    Further lines that the row needs are taken from `source` and added to `pending`.
    """
    text, wrong = "", ""
    for used in range(MAX_ROW_LINES):
        if used == len(pending):
            if (line := next(source, None)) is None:
                break
            pending.append(line)
        try:
            text += ("\n" if used else "") + _text(pending[used][1])
            return _Row(0, next(csv.reader([text], strict=True), [])), used + 1
        except csv.Error as error:
            wrong = f"it is not a row of CSV ({error})"
            if "unexpected end" not in wrong:  # otherwise a quoted caption may go on in the next line
                break
        except ValueError as error:
            wrong = wrong or str(error)
            break
    return _Row(0, [], wrong), 1
