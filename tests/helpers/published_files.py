"""Writes files as benchmarks are published: tables of the hub with encoded images, JSON, and pictures of one colour.

Also changes such files, for tests of wrong ones, and reads them as the benchmarks do. The files of single benchmarks,
in every layout, are in the modules beside this one whose names begin with published_.
"""

import base64
import io
import json
import pathlib
from collections.abc import Callable, Sequence

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from fastvlm_jax.evaluate.benchmark import Row
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: str | tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE, GREEN = png("red"), png("blue"), png("green")


def save(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def dump(path: pathlib.Path, value) -> None:
    """Writes a value as JSON."""
    save(path, json.dumps(value).encode())


def dump_lines(path: pathlib.Path, rows: Sequence[dict]) -> None:
    """Writes a list of objects as JSON lines."""
    save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def table(path: pathlib.Path, rows: Sequence[dict], columns: Sequence[str]) -> None:
    """Writes a table of VLMEvalKit: tab-separated, with quotes around all cells but those that are empty."""
    lines = ["\t".join(columns)]
    for row in rows:
        cells = [str(row[name]).replace('"', '""') for name in columns]
        lines.append("\t".join(f'"{cell}"' if cell else "" for cell in cells))
    save(path, ("\n".join(lines) + "\n").encode())


def parquet(path: pathlib.Path, rows: Sequence[dict], images: Sequence[str] = ("image",)) -> None:
    """Writes a table; bytes in the columns `images`, alone or in a list, become images as the hub has them."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name not in images:
            columns[name] = pa.array(values)
        elif any(isinstance(value, list) for value in values):
            listed = [None if value is None else [{"bytes": data} for data in value] for value in values]
            columns[name] = pa.array(listed, pa.list_(IMAGE))
        else:
            columns[name] = pa.array([None if value is None else {"bytes": value} for value in values], IMAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def without(row: dict, *names: str) -> dict:
    return {key: value for key, value in row.items() if key not in names}


def nothing(folder: pathlib.Path) -> None:
    """Leaves the folder as it is."""


def drop(path: str) -> Callable[[pathlib.Path], None]:
    """Returns a change of a folder: the file at `path` is removed."""
    return lambda folder: (folder / path).unlink()


def edit(path: str, change: Callable) -> Callable[[pathlib.Path], None]:
    """Returns a change of a folder: `change` is applied in place to the value of the JSON file at `path`."""

    def apply(folder):
        value = json.loads((folder / path).read_text())
        change(value)
        dump(folder / path, value)

    return apply


def edit_lines(path: str, change: Callable) -> Callable[[pathlib.Path], None]:
    """Returns a change of a folder: `change` is applied in place to the list of objects of JSON lines at `path`."""

    def apply(folder):
        rows = [json.loads(line) for line in (folder / path).read_text().splitlines()]
        change(rows)
        dump_lines(folder / path, rows)

    return apply


def read(name: str, folder: pathlib.Path) -> list[Row]:
    """Returns the rows of a benchmark whose files lie in a folder."""
    return BENCHMARKS[name].read(epath.Path(folder))
