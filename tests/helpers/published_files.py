"""Writes files as benchmarks are published: tables of the hub with encoded images, and pictures of one colour."""

import base64
import io
import pathlib
from collections.abc import Sequence

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: str | tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def save(path: pathlib.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


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
