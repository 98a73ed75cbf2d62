"""Reads the tables in which VLMEvalKit publishes benchmarks: tab-separated, with images in base64.

index   image          question   A      B     answer
0       iVBORw0KGg..   Which?     leaf   frog  B
1       0              Where?     here   there A        the image of row 0
"""

import base64
import binascii
import csv
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers import files
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate.benchmark import Picture
from fastvlm_jax.evaluate.published import named
from fastvlm_jax.files import refuse_pointer

MAX_CELL = 256 << 20  # characters of a cell; an image in base64 is one


def read_table(path: epath.Path, columns: Sequence[str], pictures: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the rows of VLMEvalKit's table: tab-separated, with quotes, and images in base64.

    Args:
      columns: columns that must be there; all others are read too.
      pictures: columns of images in base64, which must be there. A value becomes a Picture that reads the file again,
        or None if it is empty; a short value is the index of another row, whose image it shares.

    Raises:
      ValueError: the table is damaged or lacks a column.
    """
    refuse_pointer(path)
    rows: list[dict[str, Any]] = []
    seen: dict[str, dict[str, Any]] = {}
    for start, names, cells in _records(path):
        if not rows:
            for name in (*columns, *pictures):
                if name not in names:
                    raise ValueError(f"{path} has no column {name}: it has {named(names)}")
        if len(cells) != len(names):
            raise ValueError(f"{path} row {len(rows)} has {len(cells)} cells, and the head {len(names)} names")
        row: dict[str, Any] = dict(zip(names, cells, strict=True))
        for name in pictures:
            text = row.get(name, "").strip()
            if not text:
                row[name] = None
            elif len(text) <= 64:  # no image is that short
                if text not in seen:
                    raise ValueError(f"{path} row {len(rows)}: {name} is {shown(text)}, which no row before it has")
                row[name] = seen[text][name]
            else:
                where = f"{path.name} row {len(rows)} {name}"
                read = functools.partial(_read_base64, path, start, names.index(name), where)
                row[name] = Picture(where, read, path, True)
        if "index" in row:
            seen[row["index"]] = row
        rows.append(row)
    return rows


def _records(path: epath.Path, start: int | None = None) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yields (first byte, column names, cells) of each row; with `start`, those from there on and no names."""
    csv.field_size_limit(MAX_CELL)
    with path.open("rb") as file:
        at = [start or 0]
        file.seek(at[0])

        def texts() -> Iterator[str]:
            while line := file.readline(2 * MAX_CELL):
                at[0] += len(line)
                yield line.decode("utf-8-sig")

        reader = csv.reader(texts(), delimiter="\t")
        try:
            names = next(reader, []) if start is None else []
            first = at[0]
            for cells in reader:
                if cells:
                    yield first, names, cells
                first = at[0]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no table of tab-separated UTF-8: {error}") from error


def _read_base64(path: epath.Path, start: int, column: int, where: str) -> bytes:
    _, _, cells = next(_records(path, start))
    try:
        return files.checked(base64.b64decode(cells[column], validate=False), where)
    except binascii.Error as error:
        raise ValueError(f"{where} is no base64: {error}") from error
