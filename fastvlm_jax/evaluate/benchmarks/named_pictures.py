"""Reads pictures with what names them, a class or captions, from any of these layouts:

test/nshards.txt test/0.tar ...        WebDataset, as CLIP_benchmark exports its sets: KEY.webp with KEY.cls, the
                                       number of a class, or with KEY.txt, a caption a line
test-00000-of-00001.parquet            a table: a picture with a number `label`, or with captions
test/CLASS/*.jpg                       a folder for each class, or CLASS/*.jpg; the classes count by their names
manifest.json ...                      shards of `fastvlm data write`: the caption is the class
classnames.txt                         the name of each class, a line each, beside the first three
zeroshot_classification_templates.txt  sentences with {c} for the class; without it, the name alone is the text
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from etils import epath

from fastvlm_jax.data.captions import captions_of
from fastvlm_jax.data.readers import tar
from fastvlm_jax.data.readers.columns import CAPTIONS, IMAGES
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.files import MAX_IMAGE_BYTES, checked
from fastvlm_jax.data.readers.members import IMAGE, Held, held
from fastvlm_jax.data.sources import MANIFEST, RecordSource, read_shards
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import Picture
from fastvlm_jax.files import read_small

NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"  # "retrieval" or "multilabel"; without it the pictures have one class each
LABELS = ("label", "labels", "cls", "class", "fine_label")
MAX_TEXT = 1 << 20  # bytes of a member that names a picture
SPLIT, OWN_SPLIT = "test", "validation"  # by default, of published files and of shards


class Named(NamedTuple):
    """Holds a picture and what names it: the number of its class, or its captions."""

    id: str
    picture: Picture
    name: int | tuple[str, ...]


class Classes(NamedTuple):
    """Holds pictures with the number of their class, the names of all classes, and the sentences about one."""

    pictures: list[Named]
    names: tuple[str, ...]
    templates: tuple[str, ...]


def read_classes(folder: epath.Path, split: str | None = None) -> Classes:
    """Returns the pictures of a split with their classes.

    Raises:
      FileNotFoundError: the folder has none of the layouts, or lacks the names of the classes.
      ValueError: a file is damaged, or a picture has a class that has no name.
    """
    if (folder / MANIFEST).exists():
        return classes_of(read_shards(folder, split or OWN_SPLIT))
    _check_type(folder, ("", "classification"), "retrieval")
    split, names = split or SPLIT, ()
    if tars := _tars(folder, split):
        pictures = [Named(name, picture, _number(value, name)) for name, picture, value in _in_tars(tars, "cls")]
    elif tables := _tables(folder, split):
        pictures, names = _in_tables(tables, LABELS, published.number), _names_in(tables[0])
    elif folders := _class_folders(folder, split):
        pictures = list(_in_folders(*folders))
    else:
        raise _wrong_layout(folder, split, f"{split}/CLASS/*.jpg with {NAMES}")
    names = names or _lines(folder / NAMES, "the name of a class", f"beside {split}, in the order of their numbers")
    for picture in pictures:
        if not 0 <= picture.name < len(names):
            raise ValueError(f"{picture.id} is of class {picture.name}, and {folder / NAMES} names {len(names)}")
    templates = (folder / TEMPLATES).exists() and _lines(folder / TEMPLATES, "a sentence with {c}", "")
    if wrong := [template for template in templates or () if "{c}" not in template]:
        raise ValueError(f"{folder / TEMPLATES}: {shown(wrong[0])} has no {{c}}, where the name of the class stands")
    return Classes(pictures, names, templates or ("{c}",))


def read_captions(folder: epath.Path, split: str | None = None) -> list[Named]:
    """Returns the pictures of a split with their captions; see `read_classes` for the errors."""
    if (folder / MANIFEST).exists():
        return captioned(read_shards(folder, split or OWN_SPLIT))
    _check_type(folder, ("", "retrieval"), "zero-shot")
    split = split or SPLIT
    if tars := _tars(folder, split):
        return [Named(name, picture, _captions(value, name)) for name, picture, value in _in_tars(tars, "txt")]
    if tables := _tables(folder, split):
        return _in_tables(tables, CAPTIONS, _text_or_texts)
    raise _wrong_layout(folder, split, "shards of `fastvlm data write`")


def classes_of(source: RecordSource) -> Classes:
    """Returns the pictures of shards; each different caption is a class."""
    found = captioned(source)
    names = tuple(sorted({picture.name[0] for picture in found}))
    numbers = {name: number for number, name in enumerate(names)}
    return Classes([picture._replace(name=numbers[picture.name[0]]) for picture in found], names, ("{c}",))


def captioned(source: RecordSource) -> list[Named]:
    """Returns the pictures of shards with their captions.

    Raises:
      ValueError: a record is not one picture and its caption.
    """
    found, seen = [], set()
    for number in range(len(source)):
        record = source[number]
        try:
            captions = captions_of(record)
        except ValueError as error:
            raise ValueError(f"{source.where(number)}, {shown(record.key)}: {error}") from error
        name = record.key if record.key not in seen else f"{record.key} (record {number})"
        seen.add(record.key)
        picture = Picture(f"record {number}", functools.partial(_of_record, source, number))
        found.append(Named(name, picture, tuple(captions)))
    return _some(found, f"the split {source.split!r} of {source.folder}")


def _of_record(source: RecordSource, number: int) -> bytes:
    return source[number].images[0]


def _some(found: list[Named], where: str) -> list[Named]:
    if not found:
        raise ValueError(f"{where} holds no pictures")
    return found


def _check_type(folder: epath.Path, fitting: Sequence[str], other: str) -> None:
    """Raises ValueError if dataset_type.txt says that the pictures have other names."""
    if not (folder / TYPE).is_file():
        return
    kind = read_small(folder / TYPE, MAX_TEXT).decode(errors="replace").strip().lower()
    if kind not in fitting:
        mend = "several classes a picture are not scored here" if kind == "multilabel" else f"give --benchmark {other}"
        raise ValueError(f"{folder / TYPE} says {shown(kind)}: {mend}")


def _wrong_layout(folder: epath.Path, split: str, last: str) -> FileNotFoundError:
    return published.wrong_layout(folder, (f"{split}/*.tar", f"{split}-*.parquet", last))


def _lines(path: epath.Path, what: str, where: str) -> tuple[str, ...]:
    """Returns the lines of a text file without white space at their ends."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: write {what} a line {where}".rstrip())
    try:
        lines = tuple(line.strip() for line in read_small(path).decode().splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        raise ValueError(f"{path}: {where}: write {what} a line")
    return lines


def _tars(folder: epath.Path, split: str) -> list[epath.Path]:
    """Returns the tars of a split, in their order, which are as many as nshards.txt says."""
    tars = published.find(folder, f"{split}/*.tar")
    tars.sort(key=lambda path: (len(path.name), path.name))  # 0.tar ... 9.tar 10.tar
    count = folder / split / "nshards.txt"
    if tars and count.is_file():
        (line, *_) = _lines(count, "the number of tars", "")
        if line != str(len(tars)):
            raise ValueError(f"{count} says {shown(line)} tars and {len(tars)} are there: copy the others")
    return tars


def _in_tars(paths: Sequence[epath.Path], extension: str) -> Iterator[tuple[str, Picture, str]]:
    """Yields name, picture and the text of KEY.`extension` of each entry of tars."""
    for path in paths:
        pictures: dict[str, Held] = {}
        texts: dict[str, str] = {}
        with path.open("rb") as file:
            for member in tar.members(file, path.stat().length):
                if not member.name:
                    raise ValueError(f"{path} byte {member.at}: {member.wrong}")
                if not (found := held(file, member)):
                    continue
                key, ending, about = found
                if about.wrong:
                    raise ValueError(f"{path}: {shown(about.name)} {about.wrong}")
                if IMAGE.fullmatch(ending):
                    pictures.setdefault(key, about)
                elif ending == extension:
                    try:
                        texts[key] = about.read(MAX_TEXT).decode()
                    except ValueError as error:
                        raise ValueError(f"{path}: {shown(about.name)} is no text: {error}") from error
        if missing := sorted(pictures.keys() ^ texts.keys()):
            what = f".{extension}" if missing[0] in pictures else "picture"
            raise ValueError(f"{path}: {shown(missing[0])} has no {what}, nor have {len(missing) - 1} others")
        for key, about in pictures.items():
            name = f"{path.parent.name}/{path.name}/{key}"
            read = functools.partial(_of_tar, path, about._replace(file=None))
            yield name, Picture(name, read, path, True), texts[key]


def _of_tar(path: epath.Path, about: Held) -> bytes:
    with path.open("rb") as file:
        return checked(about._replace(file=file).read(MAX_IMAGE_BYTES), about.name)


def _number(text: str, name: str) -> int:
    if not text.strip().isdecimal() or len(text) > 12:
        raise ValueError(f"{name}: its class is {shown(text)}, not a number")
    return int(text)


def _captions(text: str, name: str) -> tuple[str, ...]:
    """Returns the lines of a text that are not empty, as captions."""
    if not (found := tuple(line for line in text.splitlines() if line.strip())):
        raise ValueError(f"{name} has no caption")
    return found


def _tables(folder: epath.Path, split: str) -> list[epath.Path]:
    return published.find(folder, f"data/{split}-*.parquet", f"{split}-*.parquet", f"*/{split}-*.parquet")


def _in_tables(paths: Sequence[epath.Path], names: Sequence[str], read: Callable) -> list[Named]:
    """Returns the pictures of tables, with what `read` makes of the first of the columns `names`."""
    with paths[0].open("rb") as file, pq.ParquetFile(file) as table:
        columns = table.schema_arrow.names
    image, column = _first(IMAGES, columns), _first(names, columns)
    found = []
    for number, row in enumerate(published.read_parquet(paths, (column,), (image,))):
        where = f"{paths[0].parent} row {number}"
        if row[image] is None or isinstance(row[image], tuple):
            raise ValueError(f"{where}: {image} holds no picture, or several")
        found.append(Named(str(number), row[image], read(row, column, where)))
    return _some(found, str(paths[0].parent))


def _first(names: Sequence[str], columns: Sequence[str]) -> str:
    """Returns the first of the names that a column has; the first of all if none has one."""
    return next((name for name in names if name in columns), names[0])


def _text_or_texts(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    if isinstance(row[column], str):
        return _captions(row[column].replace("\n", " "), where)
    return published.texts(row, column, where)


def _names_in(path: epath.Path) -> tuple[str, ...]:
    """Returns the names of the classes that the table of a hub holds; () if it holds none."""
    with path.open("rb") as file, pq.ParquetFile(file) as table:
        columns, about = table.schema_arrow.names, (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(about)["info"]["features"][_first(LABELS, columns)]["names"]
    except (ValueError, LookupError, TypeError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _class_folders(folder: epath.Path, split: str) -> tuple[epath.Path, list[str]] | None:
    """Returns the folder of the folders of classes, and their names; None if there are none."""
    for root in (folder / split, folder):
        if root.is_dir():
            names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
            if names:
                return root, names
    return None


def _in_folders(root: epath.Path, classes: Sequence[str]) -> Iterator[Named]:
    """Yields the pictures in the folders of classes, and in theirs, by name."""
    look_up, count = published.Images(root, "."), 0
    for number, name in enumerate(classes):
        for place, folders, files in os.walk(root / name):
            folders.sort()
            for file in sorted(files):
                if IMAGE.fullmatch(file.lower().rpartition(".")[2]) and not file.startswith("."):
                    inner = os.path.relpath(os.path.join(place, file), root)
                    count += 1
                    yield Named(inner, look_up(inner), number)
    if not count:
        raise FileNotFoundError(f"the folders of {root} hold no pictures")
