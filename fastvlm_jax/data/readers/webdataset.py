"""Reads WebDataset tars: members with the same name up to its first dot make one entry.

    000000012.jpg      the image: jpg, jpeg, png, webp, gif, tif, tiff, bmp or avif; 000000012.0.jpg, .1.jpg for several
    000000012.txt      its caption
    000000012.json     an object with the keys of columns.py; its caption is used if there is no .txt (img2dataset
                       writes both)
    .syn.json .paug.json .npz .pth.gz      of DataCompDR and DFNDR, see datacompdr.py: `synthetic_captions`,
                       `synthetic_keys`, `augmentation` and `teacher` in `extra`; the .npz is read if there are both

Maps of the pixels beside an image (`.seg.png`, `.mask.png`, `.depth.png` ...) and members that are neither pictures nor
films (`.cls`, `.url.txt`) are not read. Any other picture or film (`.left.jpg`, `.svg`, `.mp4`) costs its entry.

A part is a tar; a folder without tars of its own may have them in its subfolders. The pictures may lie in a tar of the
same name in another folder, see joined.py. The members of an entry need not be neighbours: up to PENDING entries are
collected at a time, and yielded in the order of their first members.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from fastvlm_jax.data.readers import Options, Part, boxes, datacompdr, joined, members, pictures, tar, torch_file
from fastvlm_jax.data.readers.columns import CAPTIONS, kind_of
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.files import (
    MAX_IMAGE_BYTES,
    MAX_RECORD_BYTES,
    check_images_folder,
    checked,
    images_folder,
    listed,
    loads,
    looks_like,
)
from fastvlm_jax.data.readers.folders import below
from fastvlm_jax.data.readers.members import IMAGE, Entry, Held
from fastvlm_jax.data.readers.rows import row_record
from fastvlm_jax.data.record import Record, Rejected

SUFFIXES = (".tar",)
PENDING = 50_000  # entries
MAX_TEXT = 16 << 20  # bytes of a text or JSON member
MAX_ARRAYS = 64 << 20  # bytes of an .npz or .pth.gz
# Extensions of maps that belong to the pixels of an image, and are no image of their own.
_MAP = re.compile(rf"(?:.*[._-])?(?:seg|segmentation|semantic|mask|depth|normals?|edges?)\.(?:{pictures.SUFFIXES})")
_PICKLES = ("pth", "pt", "pt.gz", "pkl", "pickle", "pyd")


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a .tar file, or a folder with one in it."""
    return looks_like(path, SUFFIXES)


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns one part for a tar, for each tar in a folder or, if that has none, for each tar in its subfolders.

    Their `start` is the number of folders between the source and the tar, which belong to the keys of its entries.

    Raises:
      FileNotFoundError: there is no tar, or a folder that the options name does not exist or holds no tar that fits.
      ValueError: the keys of synthetic captions are told by no regular expression.
    """
    check_images_folder(options)
    boxes.check(options.boxes)
    try:
        re.compile(options.synthetic_keys)
    except re.error as error:
        raise ValueError(f"--synthetic_keys {options.synthetic_keys!r} is no regular expression: {error}") from error
    found = below(path, SUFFIXES[0]) if path.is_dir() and not looks_like(path, SUFFIXES) else listed(path, SUFFIXES)
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no .tar file, nor do its subfolders")
    depth = len(path.parts) + 1
    made = [Part(str(file), max(0, len(file.parts) - depth)) for file in found]
    joined.check(made, options)
    return made


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the records of a tar; each unusable entry and each damaged place of the tar is a Rejected."""
    if not options.pictures:
        yield from _read(part, options, None)
        return
    with joined.Pictures(part, options) as joins:
        yield from _read(part, options, joins)
        yield from joins.rest()


def _read(part: Part, options: Options, joins: joined.Pictures | None) -> Iterator[Record | Rejected]:
    path = epath.Path(part.path)
    entries: dict[str, Entry] = {}
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
                found = members.held(file, member)
                if not found:
                    continue
                name, extension, held = found
                if name not in entries and len(entries) >= PENDING:
                    yield from _records(part, entries, options, joins, None)
                    entries = {}
                entry = entries.setdefault(name, {})
                if extension in entry:
                    twice = members.key(members.name_of(part), member.name)
                    yield Rejected(part.path, twice, "the tar holds it twice: the first is kept")
                else:
                    entry[extension] = held
            yield from _records(part, entries, options, joins, cut)
    except OSError as error:
        yield Rejected(part.path, "byte 0", f"the tar cannot be read: {error}")


def _records(
    part: Part, entries: dict[str, Entry], options: Options, joins: joined.Pictures | None, cut: Rejected | None
) -> Iterator[Record | Rejected]:
    """Yields the record or the Rejected of each entry.

    If the last entry lacks a member because the tar is cut there, the two faults are one Rejected.
    """
    for number, (name, entry) in enumerate(entries.items()):
        key = members.key(members.name_of(part), name)
        try:
            yield _record(key, joins.join(name, entry) if joins else entry, epath.Path(part.path), options)
        except ValueError as error:
            if cut and number == len(entries) - 1:
                cut = cut._replace(key=key)
            else:
                yield Rejected(part.path, key, str(error))
    if cut:
        yield cut


def _record(key: str, entry: Entry, path: epath.Path, options: Options) -> Record:
    for extension, member in entry.items():
        if member.wrong:
            raise ValueError(f"{shown(member.name)} {member.wrong}")
        if extension in _PICKLES:
            name = shown(member.name)
            raise ValueError(f"{name} is a Python pickle, which can run code: take the edition of the data with .npz")
    _refuse_unread(entry)
    about = _json(entry["json"]) if "json" in entry else {}
    if not isinstance(about, dict):
        raise ValueError(f"{shown(entry['json'].name)} holds {shown(about)}, not an object")
    row = {name: value.strip() if isinstance(value, str) else value for name, value in about.items()}
    images = _images(entry)
    if images:
        row["jpg"] = images
    if "txt" in entry:
        row = {k: v for k, v in row.items() if k.lower() not in CAPTIONS or kind_of(k, v) != "text"}
        row["txt"] = _text(entry)
    if not row.keys() - {"jpg"}:
        raise ValueError(f"no caption and no conversation among its members {shown(', '.join(entry))}")
    record = row_record(key, row, images_folder(path, options), options)
    return dataclasses.replace(record, extra=record.extra | _extra(entry, record, about, options))


def _refuse_unread(entry: Entry) -> None:
    """Raises ValueError for a picture, a film or a sound that is not read; maps beside an image are none."""
    pictured = any(IMAGE.fullmatch(extension) for extension in entry)
    for extension, member in entry.items():
        if IMAGE.fullmatch(extension) or not pictures.is_name(member.name) or (pictured and _MAP.fullmatch(extension)):
            continue
        raise ValueError(
            f"{shown(member.name)} is not read: an entry has pictures KEY.jpg (.png, .webp, .gif, .tif, .bmp, .avif), "
            "or KEY.0.jpg, KEY.1.jpg ..., and no film or sound"
        )


def _images(entry: Entry) -> list[bytes]:
    found = [(int(match[1] or -1), entry[name]) for name in entry if (match := IMAGE.fullmatch(name))]
    held = [member for _, member in sorted(found, key=lambda numbered: numbered[0])]
    if sum(member.size for member in held) > MAX_RECORD_BYTES:
        raise ValueError(f"its images are more than {MAX_RECORD_BYTES >> 20} MB together")
    return [checked(member.read(MAX_IMAGE_BYTES), member.name) for member in held]


def _json(member: Held) -> Any:
    data = member.read(MAX_TEXT)
    try:
        return loads(data)
    except ValueError as error:
        raise ValueError(f"{shown(member.name)}: {error}") from error


def _text(entry: Entry) -> str:
    try:
        return entry["txt"].read(MAX_TEXT).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(entry['txt'].name)} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _extra(entry: Entry, record: Record, about: dict[str, Any], options: Options) -> dict[str, Any]:
    """Returns what the members of a reinforced set add to a record; `about` is its parsed .json."""
    parsed = {name: _json(entry[name]) for name in ("syn.json", "paug.json") if name in entry}
    for name, value in parsed.items():
        if value is None:
            raise ValueError(f"{shown(entry[name].name)} is null")
    if options.boxes and "paug.json" in parsed and len(record.images) == 1:
        parsed["paug.json"] = boxes.of_picture(parsed["paug.json"], options.boxes, about, record.images[0])
    arrays = {}
    if "npz" in entry:
        arrays = datacompdr.embeddings(entry["npz"].read(MAX_ARRAYS))
    elif "pth.gz" in entry:
        arrays = torch_file.embeddings(entry["pth.gz"].read(MAX_ARRAYS))
    captions = len(record.extra.get("captions", [])) or 1
    return datacompdr.extra_of(parsed.get("syn.json"), parsed.get("paug.json"), arrays, captions, options)
