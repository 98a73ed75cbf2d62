"""Reads Parquet files as hubs publish them: images as bytes beside conversations, questions or captions.

Row groups are read a few rows at a time, and only the columns that records need. Columns are recognised by their types
and, where several fit, by their names (columns.py). In a folder, files named `train-...`, `validation-...` or
`test-...` belong to that split; files with other names belong to every split.
"""

import concurrent.futures
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from fastvlm_jax.data.readers import Options, Part, columns
from fastvlm_jax.data.readers.files import MAX_RECORD_BYTES, checked, images_folder, read_image
from fastvlm_jax.data.readers.folders import any_below, below
from fastvlm_jax.data.record import Record, Rejected

_PART_BYTES = 64 << 20  # bytes of the row groups in a part
_ROWS = 16  # rows in memory at a time
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_SAME_SPLIT = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a .parquet file, or a folder with one in or below it."""
    try:
        return path.suffix == ".parquet" if not path.is_dir() else any_below(path, ".parquet")
    except (OSError, ValueError):
        return False


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns runs of row groups of about 64 MB; a file that cannot be opened is one part.

    Raises:
      FileNotFoundError: `path` does not exist, or holds no file of this split.
      ValueError: no file has columns that a record can be made from, or two files would give their rows the same keys.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = _of_split(below(path, ".parquet"), path, options.split) if path.is_dir() else [path]
    names = [name_of(file) for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two files are called {twice}.parquet: write their folders one by one, as two splits")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(_parts_of, files))
    reasons = [reason for _, reason in found if reason]
    if len(reasons) == len(files):
        raise ValueError(f"{files[0]}: {reasons[0]}")
    return [part for own, _ in found for part in own]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the rows of some row groups. A damaged row group is one Rejected, and so is an unreadable file."""
    path = epath.Path(part.path)
    with path.open("rb") as file:
        try:
            table = _opened(file)
            plan = columns.plan(_kinds(table.schema_arrow))
        except _BROKEN as error:
            yield Rejected(part.path, name_of(path), _line(error))
            return
        groups = range(part.start, table.num_row_groups if part.stop < 0 else part.stop)
        for group in groups:
            yield from _rows_of(table, group, plan, path, options)


# What pyarrow raises for damaged files; most of its own errors are ValueErrors or OSErrors.
_BROKEN = (pa.ArrowException, ValueError, OSError, MemoryError, NotImplementedError, RuntimeError)


def _rows_of(table: pq.ParquetFile, group: int, plan: columns.Plan, path, options) -> Iterator[Record | Rejected]:
    wanted = [*plan.images, *plan.texts, *([plan.id] if plan.id else [])]
    first = row = sum(table.metadata.row_group(i).num_rows for i in range(group))
    end = first + table.metadata.row_group(group).num_rows
    batches = table.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except _BROKEN as error:
            where = f"rows {row} to {end - 1} of row group {group}"
            yield Rejected(str(path), f"{name_of(path)}/{row}", f"{where} cannot be read: {_line(error)}")
            return
        if batch is None:
            break
        for values in rows:
            key = f"{name_of(path)}/{row}"
            try:
                images = _images(values, plan, path, options)
                yield columns.to_record(key, images, values, plan, options)
            except ValueError as error:
                yield Rejected(str(path), key, str(error))
            row += 1
    if row != end:
        where = f"rows {row} to {end - 1} of row group {group}"
        yield Rejected(str(path), f"{name_of(path)}/{row}", f"{where} are missing")


def name_of(path: epath.Path) -> str:
    """Returns what the keys of a file's rows begin with: its folder and name, as "ai2d/train-00000-of-00001"."""
    return f"{path.parent.name}/{path.name.removesuffix('.parquet')}"


def _of_split(files: list[epath.Path], path: epath.Path, split: str) -> list[epath.Path]:
    named = {file: match and match[1].lower() for file in files for match in [_SPLIT.match(file.name)]}
    named = {file: _SAME_SPLIT.get(name, name) for file, name in named.items()}
    chosen = [file for file in files if named[file] in (None, _SAME_SPLIT.get(split, split))]
    if not chosen:
        there = ", ".join(sorted(set(filter(None, named.values())))) or "no .parquet file"
        raise FileNotFoundError(f"{path} holds no split {split!r}: it holds {there}")
    return chosen


def _parts_of(path: epath.Path) -> tuple[list[Part], str]:
    """Returns the parts of a file, and the reason why it cannot be used, "" if it can."""
    try:
        with path.open("rb") as file:
            table = _opened(file)
            columns.plan(_kinds(table.schema_arrow))
            # Asking a damaged file about single columns ends the process (pyarrow 26: an exception crosses its C++).
            sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
    except _BROKEN as error:
        return [Part(str(path))], _line(error)
    found, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        total += max(size, 0)
        if total >= _PART_BYTES or number == len(sizes) - 1:
            found.append(Part(str(path), start, number + 1))
            start, total = number + 1, 0
    return found, ""


def _opened(file) -> pq.ParquetFile:
    # Without pre-buffering, a row group is read page by page, not all at once.
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


def _kinds(schema: pa.Schema) -> dict[str, str]:
    return {field.name: kind for field in schema if (kind := _kind(field.name.lower(), field.type))}


def _kind(name: str, of: pa.DataType) -> str:
    """Returns what a record can take from a column, "other" for nothing; the kinds are those of `columns.plan`."""
    inner = of.value_type if pa.types.is_list(of) or pa.types.is_large_list(of) else of
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    if pa.types.is_struct(inner):
        fields = {inner.field(i).name: inner.field(i).type for i in range(inner.num_fields)}
        if "bytes" in fields and _is_binary(fields["bytes"]):
            return "image"
        if inner is not of and ({"from", "value"} <= fields.keys() or {"role", "content"} <= fields.keys()):
            return "messages"
        if inner is not of and {"user", "assistant"} <= fields.keys():
            return "pairs"
    if _is_binary(inner):
        return "image" if name in columns.IMAGES else "other"
    if pa.types.is_string(inner) or pa.types.is_large_string(inner):
        return "text"
    return "other"


def _is_binary(of: pa.DataType) -> bool:
    return pa.types.is_binary(of) or pa.types.is_large_binary(of)


def _images(row: dict[str, Any], plan: columns.Plan, path: epath.Path, options: Options) -> list[bytes]:
    found, size = [], 0
    for name in plan.images:
        value = row[name]
        for image in value if isinstance(value, list) else [value]:
            if image is None:
                if isinstance(value, list):
                    raise ValueError(f"{name} holds a null")
                continue
            if isinstance(image, dict):
                data = image["bytes"]
                if data is None and isinstance(image.get("path"), str):
                    data = read_image(images_folder(path, options), image["path"])
                elif data is None:
                    continue
                image = data
            found.append(checked(image, name))
            size += len(image)
            if size > MAX_RECORD_BYTES:
                raise ValueError(f"its images are more than {MAX_RECORD_BYTES >> 20} MB together")
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
