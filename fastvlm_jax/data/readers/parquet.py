"""Reads Parquet files as hubs publish them: images as bytes or names beside conversations, questions or captions.

Row groups are read a few rows at a time, and only the columns that records need. Columns are recognised by their types
and, where several fit, by their names (columns.py); of all other columns the first value is looked at, so that pictures
under a name that is not known are found too. In a folder, files named `train-...`, `validation-...` or
`test-...` belong to that split; files with other names belong to every split.
"""

import concurrent.futures
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from fastvlm_jax.data.readers import Options, Part, columns, pictures
from fastvlm_jax.data.readers.files import check_images_folder, images_folder
from fastvlm_jax.data.readers.folders import any_below, below
from fastvlm_jax.data.readers.rows import to_record
from fastvlm_jax.data.record import Record, Rejected

_PART_BYTES = 64 << 20  # bytes of the row groups in a part
_ROWS = 16  # rows in memory at a time
_MAX_NULLS = 100_000  # rows that are searched for the first value of a column that is not known
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
      FileNotFoundError: `path` or `options.images` does not exist, or `path` holds no file of this split.
      ValueError: no file has columns that a record can be made from, or two files would give their rows the same keys.
    """
    check_images_folder(options)
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
            plan = _plan(table)
        except _BROKEN as error:
            yield Rejected(part.path, name_of(path), _line(error))
            return
        groups = range(part.start, table.num_row_groups if part.stop < 0 else part.stop)
        for group in groups:
            yield from _rows_of(table, group, plan, path, options)


# What pyarrow raises for damaged files; most of its own errors are ValueErrors or OSErrors.
_BROKEN = (pa.ArrowException, ValueError, OSError, MemoryError, NotImplementedError, RuntimeError)


def _rows_of(table: pq.ParquetFile, group: int, plan: columns.Plan, path, options) -> Iterator[Record | Rejected]:
    folder, wanted = images_folder(path, options), [*plan.needed, *plan.others]
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
                yield to_record(key, values, plan, folder, options)
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
            _plan(table)
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


def _plan(table: pq.ParquetFile) -> columns.Plan:
    """Returns the plan for a file. Its other columns are only those that may hold pictures, videos or sounds.

    A column is looked at in every row if its first value is like a picture or is damaged, and, in a file without a
    column of encoded images, if it has any text.
    """
    types = {field.name: field.type for field in table.schema_arrow}
    kinds = {name: _kind(of) for name, of in types.items()}
    looked_at = {name for name in types if columns.sound_or_video(name)}
    for name in columns.try_plan(kinds).others:
        try:
            value = _first_value(table, name) if any(map(_is_text_or_binary, _leaves(types[name]))) else None
        except _BROKEN:
            looked_at.add(name)
            continue
        if kinds[name] == "binary" and _is_picture(value):
            kinds[name] = "image"
        elif any(pictures.found_in(value)):
            looked_at.add(name)
    plan = columns.plan(kinds)
    if not plan.images:
        looked_at |= {name for name in plan.others if any(map(_is_text, _leaves(types[name])))}
    return plan._replace(others=tuple(name for name in plan.others if name in looked_at))


def _is_picture(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, bytes) and pictures.is_picture(first)


def _leaves(of: pa.DataType) -> Iterator[pa.DataType]:
    """Yields the types of the single values in a nested type."""
    if _is_list(of) or pa.types.is_dictionary(of):
        yield from _leaves(of.value_type)
    elif pa.types.is_map(of):
        yield from (*_leaves(of.key_type), *_leaves(of.item_type))
    elif pa.types.is_struct(of):
        for i in range(of.num_fields):
            yield from _leaves(of.field(i).type)
    else:
        yield of


def _first_value(table: pq.ParquetFile, name: str) -> Any:
    """Returns the first value of a column that is not null and not empty; None if there is none in its first rows."""
    rows = 0
    for batch in table.iter_batches(_ROWS, columns=[name], use_threads=False):
        values = batch.column(0).to_pylist()
        if (value := next((value for value in values if value not in (None, "", [])), None)) is not None:
            return value
        if (rows := rows + len(values)) >= _MAX_NULLS:
            break
    return None


def _kind(of: pa.DataType) -> str:
    """Returns what a record can take from a column; the kinds are those of `columns.plan`."""
    inner = _inner(of)
    if pa.types.is_struct(inner):
        fields = {inner.field(i).name: inner.field(i).type for i in range(inner.num_fields)}
        listed = inner is not of or all(_is_list(field) for field in fields.values())
        if "bytes" in fields and _is_binary(fields["bytes"]):
            return "image"
        if listed and columns.is_messages(fields):
            return "messages"
        if listed and columns.pair_keys(fields):
            return "pairs"
        return "other" if inner is not of else "object"
    if _is_binary(inner):
        return "binary"
    return "text" if _is_text(inner) else "other"


def _inner(of: pa.DataType) -> pa.DataType:
    """Returns the type of the values in a list and in a dictionary of values; else the type itself."""
    of = of.value_type if _is_list(of) else of
    return of.value_type if pa.types.is_dictionary(of) else of


def _is_list(of: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(of) for kind in (*kinds, pa.types.is_list_view, pa.types.is_large_list_view))


def _is_text(of: pa.DataType) -> bool:
    return pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of)


def _is_text_or_binary(of: pa.DataType) -> bool:
    return _is_text(of) or _is_binary(of)


def _is_binary(of: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(kind(of) for kind in kinds)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
