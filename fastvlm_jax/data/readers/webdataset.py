"""Reads WebDataset tars: members with the same name up to its first dot make one entry.

    000000012.jpg      the image: jpg, jpeg, png, webp, gif, tif, tiff, bmp or avif; 000000012.0.jpg, .1.jpg for several
    000000012.txt      its caption
    000000012.json     an object with the keys of columns.py; its caption is used if there is no .txt (img2dataset
                       writes both)
    .syn.json .paug.json .npz      of DataCompDR: `synthetic_captions`, `augmentation` and `teacher` in `extra`

Maps of the pixels beside an image (`.seg.png`, `.mask.png`, `.depth.png` ...) and members that are neither pictures nor
films (`.cls`, `.url.txt`) are not read. Any other picture or film (`.left.jpg`, `.svg`, `.mp4`) costs its entry.

A part is a tar. The members of an entry need not be neighbours: up to PENDING entries are collected at a time, and
yielded in the order of their first members.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from fastvlm_jax.data.readers import Options, Part, datacompdr, pictures, tar
from fastvlm_jax.data.readers.columns import CAPTIONS, kind_of
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.files import (
    MAX_IMAGE_BYTES,
    MAX_RECORD_BYTES,
    check_images_folder,
    checked,
    images_folder,
    key_of,
    listed,
    loads,
    looks_like,
)
from fastvlm_jax.data.readers.rows import row_record
from fastvlm_jax.data.record import Record, Rejected

SUFFIXES = (".tar",)
PENDING = 50_000  # entries
MAX_TEXT = 16 << 20  # bytes of a text or JSON member
MAX_NPZ = 64 << 20  # bytes
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_IMAGE = re.compile(rf"(?:(\d{{1,9}})\.)?(?:{pictures.SUFFIXES})")
# Extensions of maps that belong to the pixels of an image, and are no image of their own.
_MAP = re.compile(rf"(?:.*[._-])?(?:seg|segmentation|semantic|mask|depth|normals?|edges?)\.(?:{pictures.SUFFIXES})")
_META = re.compile(r"__[^/]*__")  # members that WebDataset itself writes
_PICKLES = ("pth", "pth.gz", "pt", "pt.gz", "pkl", "pickle", "pyd")

_Entry = dict[str, tar.Member]  # extension to member


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a .tar file, or a folder with one in it."""
    return looks_like(path, SUFFIXES)


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns one part for a tar, or for each tar in a folder; raises FileNotFoundError if there is none."""
    check_images_folder(options)
    return [Part(str(file)) for file in listed(path, SUFFIXES)]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the records of a tar; each unusable entry and each damaged place of the tar is a Rejected."""
    path = epath.Path(part.path)
    entries: dict[str, _Entry] = {}
    cut = None
    try:
        with path.open("rb") as file:
            for member in tar.members(file, path.stat().length):
                if cut:  # members follow, so this damage is not the end that an entry lost
                    yield cut
                    cut = None
                if not member.name:
                    cut = Rejected(part.path, f"byte {member.at}", member.wrong)
                    continue
                if _META.fullmatch(member.name):
                    continue
                key, extension, wrong = _split(member.name)
                if key not in entries and len(entries) >= PENDING:
                    yield from _records(path, file, entries, options, None)
                    entries = {}
                entry = entries.setdefault(key, {})
                if extension in entry:
                    name = f"{path.name}/{_printable(member.name)}"
                    yield Rejected(part.path, name, "the tar holds it twice: the first is kept")
                else:
                    entry[extension] = member._replace(wrong=wrong or member.wrong)
            yield from _records(path, file, entries, options, cut)
    except OSError as error:
        yield Rejected(part.path, "byte 0", f"the tar cannot be read: {error}")


def _split(name: str) -> tuple[str, str, str]:
    """Returns (key, extension in lower case, what is wrong with the name or "")."""
    name = name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        return name, "", "has a name that leads out of its folder"
    found = _NAME.fullmatch(name)
    return (found[1], found[2].lower(), "") if found else (name, "", "has no name of the form KEY.EXTENSION")


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= 200 else key_of(name, name.encode("utf-8", "surrogateescape"))


def _records(
    path: epath.Path, file: IO[bytes], entries: dict[str, _Entry], options: Options, cut: Rejected | None
) -> Iterator[Record | Rejected]:
    """Yields the record or the Rejected of each entry.

    If the last entry lacks a member because the tar is cut there, the two faults are one Rejected.
    """
    for number, (name, entry) in enumerate(entries.items()):
        key = f"{path.name}/{_printable(name)}"
        try:
            yield _record(key, entry, file, path, options)
        except ValueError as error:
            if cut and number == len(entries) - 1:
                cut = cut._replace(key=key)
            else:
                yield Rejected(str(path), key, str(error))
    if cut:
        yield cut


def _record(key: str, entry: _Entry, file: IO[bytes], path: epath.Path, options: Options) -> Record:
    for extension, member in entry.items():
        if member.wrong:
            raise ValueError(f"{shown(member.name)} {member.wrong}")
        if extension in _PICKLES:
            name = shown(member.name)
            raise ValueError(f"{name} is a Python pickle, which can run code: take the edition of the data with .npz")
    _refuse_unread(entry)
    about = loads(_bytes(file, entry["json"], MAX_TEXT)) if "json" in entry else {}
    if not isinstance(about, dict):
        raise ValueError(f"{shown(entry['json'].name)} holds {shown(about)}, not an object")
    row = {name: value.strip() if isinstance(value, str) else value for name, value in about.items()}
    images = _images(entry, file)
    if images:
        row["jpg"] = images
    if "txt" in entry:
        row = {k: v for k, v in row.items() if k.lower() not in CAPTIONS or kind_of(k, v) != "text"}
        row["txt"] = _text(entry, file)
    if not row.keys() - {"jpg"}:
        raise ValueError(f"no caption and no conversation among its members {shown(', '.join(entry))}")
    record = row_record(key, row, images_folder(path, options), options)
    return dataclasses.replace(record, extra=record.extra | _extra(entry, file))


def _refuse_unread(entry: _Entry) -> None:
    """Raises ValueError for a picture, a film or a sound that is not read; maps beside an image are none."""
    pictured = any(_IMAGE.fullmatch(extension) for extension in entry)
    for extension, member in entry.items():
        if _IMAGE.fullmatch(extension) or not pictures.is_name(member.name) or (pictured and _MAP.fullmatch(extension)):
            continue
        raise ValueError(
            f"{shown(member.name)} is not read: an entry has pictures KEY.jpg (.png, .webp, .gif, .tif, .bmp, .avif), "
            "or KEY.0.jpg, KEY.1.jpg ..., and no film or sound"
        )


def _images(entry: _Entry, file: IO[bytes]) -> list[bytes]:
    found = [(int(match[1] or -1), entry[name]) for name in entry if (match := _IMAGE.fullmatch(name))]
    members = [member for _, member in sorted(found, key=lambda numbered: numbered[0])]
    if sum(member.size for member in members) > MAX_RECORD_BYTES:
        raise ValueError(f"its images are more than {MAX_RECORD_BYTES >> 20} MB together")
    return [checked(_bytes(file, member, MAX_IMAGE_BYTES), member.name) for member in members]


def _text(entry: _Entry, file: IO[bytes]) -> str:
    try:
        return _bytes(file, entry["txt"], MAX_TEXT).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(entry['txt'].name)} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _extra(entry: _Entry, file: IO[bytes]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if "syn.json" in entry:
        captions = datacompdr.synthetic_captions(loads(_bytes(file, entry["syn.json"], MAX_TEXT)))
        extra["synthetic_captions"] = captions
    if "paug.json" in entry:
        extra["augmentation"] = datacompdr.augmentation(loads(_bytes(file, entry["paug.json"], MAX_TEXT)))
    if "npz" in entry:
        extra["teacher"] = datacompdr.embeddings(_bytes(file, entry["npz"], MAX_NPZ))
    return extra


def _bytes(file: IO[bytes], member: tar.Member, limit: int) -> bytes:
    if member.size > limit:
        raise ValueError(f"{shown(member.name)} is over {limit >> 20} MB")
    file.seek(member.at)
    data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError(f"{shown(member.name)} is cut: the tar has changed")
    return data
