"""Reads the files in which benchmarks are published: Parquet, JSON, JSON lines, and image folders; table.py: tables.

Every function raises ValueError or FileNotFoundError with one line that names the file, and the row, column or key.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from fastvlm_jax.data.readers import files
from fastvlm_jax.data.readers.conversations import shown, text_of
from fastvlm_jax.evaluate.benchmark import Picture, Row
from fastvlm_jax.files import read_small, refuse_pointer

MAX_LINE = 64 << 20  # bytes of a line of JSON lines
MAX_JSON = 256 << 20  # bytes of a JSON file; GQA's validation questions have 104 MB
MAX_NAMES = 300  # characters of a list of names in an error message
MAX_LOOKED = 20_000  # files of a folder among which a mistake is looked for
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".zst", ".xz")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")  # endings that downloads have
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")


def find(folder: epath.Path, *patterns: str) -> list[epath.Path]:
    """Returns the files of the first pattern that any file in the folder matches, by name; [] if none does.

    Args:
      patterns: such as "data/test-*.parquet" or "*/validation-*.parquet", relative to the folder.

    Raises:
      ValueError: of a file in parts, as test-00000-of-00003.parquet, a part is missing; or the folder is a bucket.
    """
    if "://" in os.fspath(folder):
        raise ValueError(f"{folder} must be a folder of this machine: mount the bucket, see docs/tpu.md")
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
        if found:
            _check_parts(found)
            return found
    return []


def _check_parts(paths: Sequence[epath.Path]) -> None:
    numbers: dict[tuple[epath.Path, str, int], set[int]] = {}
    for path in paths:
        if match := _PART.search(path.name):
            stem = path.name[: match.start()]
            numbers.setdefault((path.parent, stem, int(match[2])), set()).add(int(match[1]))
    for (parent, stem, count), found in numbers.items():
        if missing := sorted(set(range(count)) - found):
            raise ValueError(
                f"{parent} lacks {stem}-{missing[0]:05d}-of-{count:05d}.parquet: it has {len(found)} of {count} parts"
            )


def wrong_layout(folder: epath.Path, layouts: Sequence[str]) -> FileNotFoundError:
    """Returns the error of a folder that holds no layout of a benchmark; `layouts` are the lines of Benchmark.files."""
    if not folder.is_dir():
        return FileNotFoundError(
            f"{folder} is a file, not a folder" if folder.exists() else f"there is no folder {folder}"
        )
    names = sorted(path.name for path in folder.iterdir())[:5]
    holds = ", ".join(map(shown, names)) or "nothing"
    return FileNotFoundError(f"{folder} holds {holds}: expected are {'; or '.join(layouts)}{_mistake(folder)}")


def _mistake(folder: epath.Path) -> str:
    """Returns the mend of a frequent mistake in a folder that lacks files, as "; unpack a.zip ..."; "" without one."""
    walk = ((os.path.join(root, name), name.lower()) for root, _, names in os.walk(folder) for name in sorted(names))
    looked = [(os.path.relpath(path, folder), path, name) for path, name in itertools.islice(walk, MAX_LOOKED)]
    for inner, path, name in looked:
        if not os.path.exists(path):
            return f"; {shown(inner)} is a link that leads nowhere: copy the files, not the links (cp -rL)"
        if name.endswith(_UNFINISHED):
            return f"; {shown(inner)} is the rest of a download that was not finished: start it again"
    if packed := [inner for inner, _, name in looked if name.endswith(_ARCHIVES)]:
        return f"; unpack {shown(min(packed))} if they are in it"
    if looked and all(os.sep in inner for inner, _, _ in looked):
        return f"; its first file is {shown(looked[0][0])}: name or move its folder if that is meant"
    return ""


def read_json(path: epath.Path, kind: type = dict) -> Any:
    """Returns the value of a JSON file, which must be of `kind`, dict or list."""
    refuse_pointer(path)
    try:
        value = files.loads(read_small(path, MAX_JSON))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds no {'object' if kind is dict else 'list'}: it is not the published file")
    return value


def read_objects(path: epath.Path, key: str) -> list[dict[str, Any]]:
    """Returns the objects of the list `key` of a JSON file."""
    rows = get(read_json(path), key, os.fspath(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: {key} is not a list of objects")
    return rows


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines; empty lines do not count."""
    refuse_pointer(path)
    return [row for _, row in files.objects(path, MAX_LINE)]


def get(row: Mapping[str, Any], key: str, where: str) -> Any:
    """Returns row[key]; the error of a missing key says `where` the row lies and which keys it has."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {shown(row)}, not an object")
    if key not in row:
        raise ValueError(f"{where} has no {named((key,))}: it has {named(row) or 'nothing'}")
    return row[key]


def named(names: Iterable[Any]) -> str:
    """Returns names with commas between them, as error messages give them: in one line, and not without end."""
    text = ", ".join(" ".join(str(name)[:MAX_NAMES].split()) for name in itertools.islice(names, 100))
    return text if len(text) <= MAX_NAMES else f"{text[:MAX_NAMES]}..."


def text(row: Mapping[str, Any], key: str, where: str) -> str:
    """Returns row[key], which must be a text; for errors see `get`."""
    value = get(row, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {shown(value)}, not a text")
    try:
        return text_of(value, key)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def number(row: Mapping[str, Any], key: str, where: str) -> int:
    """Returns row[key], which must be a whole number; for errors see `get`."""
    value = get(row, key, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {shown(value)}, not a whole number")
    return value


def texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Returns row[key], which must be a list of one text or more; for errors see `get`."""
    value = get(row, key, where)
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if value == [] else shown(value)
        raise ValueError(f"{where}: {key} is {what}, not a list of texts")
    if wrong := [part for part in value if not isinstance(part, str)]:
        raise ValueError(f"{where}: {key} is a list that holds {shown(wrong[0])}, not a list of texts")
    return tuple(value)


def read_parquet(
    paths: Sequence[epath.Path],
    columns: Sequence[str],
    pictures: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Returns the rows of Parquet files, with images that are read when they are needed.

    Args:
      columns: columns that must be there.
      pictures: columns of images that must be there, each a struct of bytes and path, or bytes, or a list of them. A
        value becomes a Picture, None if it is null, or a tuple of them for a list.
      optional: further columns, of images too; a row lacks the key of a column that the file lacks.

    Raises:
      ValueError: a file is damaged or lacks a column; the message names both.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        refuse_pointer(path)
        try:
            with path.open("rb") as file, pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                for name in (*columns, *pictures):
                    if name not in names:
                        raise ValueError(f"{path} has no column {name}: it has {named(names)}")
                wanted = [name for name in (*columns, *pictures, *optional) if name in names]
                for group in range(table.num_row_groups):
                    rows += _rows_of(path, table, group, wanted, pictures)
        except (pa.ArrowException, OSError) as error:
            raise _not_parquet(path, error) from error
    return rows


def _not_parquet(path: epath.Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0].rstrip('.')}: download it again")


def _rows_of(
    path: epath.Path, table: pq.ParquetFile, group: int, names: Sequence[str], required: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the rows of a row group; of images only their number is read where the file tells that none is null."""
    schema, part = table.schema_arrow, table.metadata.row_group(group)
    images = [name for name in names if name in required or _is_picture(schema.field(name).type)]
    plain = table.read_row_group(group, [name for name in names if name not in images]).to_pylist()
    rows = plain or [{} for _ in range(part.num_rows)]
    first = sum(table.metadata.row_group(before).num_rows for before in range(group))
    for name in images:
        if not _is_picture(schema.field(name).type):
            raise ValueError(f"{path}: the column {name} holds no images, it is {schema.field(name).type}")
        leaves = [part.column(i) for i in range(part.num_columns)]
        leaves = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{name}.")]
        whole = [leaf for leaf in leaves if leaf.statistics is not None and leaf.statistics.null_count == 0]
        light = [leaf.path_in_schema for leaf in leaves if leaf.path_in_schema.endswith(".path")]
        # The names of the images tell which are null and how many a list has, without reading the images.
        enough = light and any(leaf.path_in_schema.endswith((name, ".bytes")) for leaf in whole)
        column = table.read_row_group(group, light if enough else [name]).column(name)
        for i, value in enumerate(column):
            rows[i][name] = _lazy(path, group, name, i, first + i, value)
    return rows


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_picture(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _lazy(path: epath.Path, group: int, column: str, i: int, number: int, value: pa.Scalar) -> Any:
    """Returns the Picture, or the tuple of them, of a cell; None if it is null."""
    if not value.is_valid:
        return None
    # Subjects of a benchmark lie in folders, with files of the same name.
    name = f"{path.parent.name}/{path.name} row {number} {column}"
    if isinstance(value, pa.ListScalar | pa.LargeListScalar):
        return tuple(
            Picture(f"{name}[{k}]", functools.partial(_read_cell, path, group, column, i, k), path, True)
            for k in range(len(value))
        )
    if isinstance(value, pa.StructScalar) and "bytes" in value and not value["bytes"].is_valid:
        return None
    return Picture(name, functools.partial(_read_cell, path, group, column, i, None), path, True)


@functools.lru_cache(maxsize=4)  # rows are read in their order, so that a row group is read about once
def _column(path: epath.Path, group: int, column: str) -> pa.ChunkedArray:
    with path.open("rb") as file, pq.ParquetFile(file) as table:
        return table.read_row_group(group, [column]).column(column)


def _read_cell(path: epath.Path, group: int, column: str, i: int, k: int | None) -> bytes:
    try:
        value = _column(path, group, column)[i].as_py()
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(path, error) from error
    value = value if k is None else value[k]
    data = value.get("bytes") if isinstance(value, dict) else value
    return files.checked(data or b"", f"{path.name} {column}")


class Images:
    """Looks up the images that a list names in folders, and refuses names that lead out of them."""

    def __init__(self, folder: epath.Path, *names: str):
        """Takes those of the folders `names` that `folder` holds; an image is looked up in each in turn.

        Raises:
          FileNotFoundError: it holds none of them.
        """
        found = tuple(folder / name for name in names if (folder / name).is_dir())
        if not found:
            raise FileNotFoundError(
                f"{folder} has no folder of images: expected is {' or '.join(names)}{_mistake(folder)}"
            )
        self._files = files.ImagesFolder(found, link_mend="copy the file itself there")
        self._asked: dict[str, epath.Path | None] = {}

    def __call__(self, name: str) -> Picture:
        """Returns the image of that name, relative to a folder."""
        if name not in self._asked:
            places = (root / name for root in self._files.roots)
            self._asked[name] = next((place for place in places if os.path.isfile(place)), None)
        return Picture(name, functools.partial(files.read_image, self._files, name), self._asked[name])

    def check(self) -> None:
        """Raises FileNotFoundError if an image that was asked for is not there; the message counts and names them."""
        if missing := [name for name, file in self._asked.items() if file is None]:
            count = f"{len(missing)} of {len(self._asked)} images"
            mistakes = "".join(map(_mistake, self._files.roots[:1]))
            raise FileNotFoundError(f"{self._files} lacks {count}, the first {shown(missing[0])}{mistakes}")


def check_rows(rows: Sequence[Row], where: os.PathLike | str, pictures: int | None = 1) -> list[Row]:
    """Returns the rows, if there are some, their ids differ and each has its images.

    Args:
      where: the file or folder, for messages.
      pictures: least number of images of each row; None does not count them.
    """
    if not rows:
        raise ValueError(f"{where} holds no rows")
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if row.id in seen:
            raise ValueError(f"{where}: the id {shown(row.id)} of row {number} stands twice")
        seen.add(row.id)
        if pictures is not None and len(row.pictures) < pictures:
            raise ValueError(f"{where}: row {number}, id {shown(row.id)}, has no image")
    return list(rows)


def pictures_of(values: Iterable[Picture | tuple[Picture, ...] | None]) -> tuple[Picture, ...]:
    """Returns the images of cells in order, each an image, several, or none."""
    return tuple(picture for value in values if value for picture in (value if isinstance(value, tuple) else (value,)))
