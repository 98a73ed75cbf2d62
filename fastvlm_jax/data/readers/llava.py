"""Reads JSON lists, or one JSON object a line: LLaVA's `id`, `image` or `images`, and `conversations`, and their like.

    [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is on the bus?"}, {"from": "gpt", "value": "..."}]}]

columns.py says which other keys are read. A part is a range of bytes: whole entries of a list, or the lines that begin
in the range.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.conversations import shown, text_of
from fastvlm_jax.data.readers.files import (
    check_images_folder,
    images_folder,
    key_of,
    lines,
    listed,
    loads,
    looks_like,
    opened,
    whole_number,
)
from fastvlm_jax.data.readers.rows import row_record
from fastvlm_jax.data.record import Record, Rejected

SUFFIXES = (".json", ".jsonl")
MAX_ENTRY = 16 << 20  # bytes of one entry; hostile JSON takes 20 times as much memory when it is parsed
PART_ENTRIES = 20_000  # entries of a list
PART_BYTES = 32 << 20  # bytes
_CHUNK = 8 << 20  # bytes read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
# Matches up to and including the next run of opening or closing brackets outside strings.
_BRACKETS = re.compile(r'[^"{}\[\]]*+(?:"(?:[^"\\]++|\\.)*+"[^"{}\[\]]*+)*+([{\[]++|[}\]]++)', re.DOTALL)


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a .json or .jsonl file, or a folder with one in it."""
    return looks_like(path, SUFFIXES)


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns the parts of a file, or of the .json and .jsonl files in a folder; a list is parsed once to find them.

    Raises:
      FileNotFoundError: `path` or `options.images` does not exist, or `path` is a folder without such files.
      ValueError: a .json file holds no list and no object a line, or its list is broken or cut.
    """
    found = []
    check_images_folder(options)
    for file in listed(path, SUFFIXES):
        if not _is_list(file):
            with opened(file) as source:
                size = source.seek(0, os.SEEK_END)
            found += [Part(str(file), start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]
            continue
        start, count, end = 0, 0, 0
        for begin, end in _scan(file):
            if count == PART_ENTRIES or (count and end - start > PART_BYTES):
                found.append(Part(str(file), start, begin))
                count = 0
            if not count:
                start = begin
            count += 1
        if count:
            found.append(Part(str(file), start, end))
    return found


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the records of a part in order; an unusable entry is a Rejected, named by its key or first byte."""
    path = epath.Path(part.path)
    folder = images_folder(path, options)
    seen: dict[str, int] = {}
    try:
        for at, raw, entry in (_list_entries if _is_list(path) else _line_entries)(part):
            key = f"byte {at}"
            try:
                name = _name(entry)
                key = key_of(name or path.stem, raw)
                if key in seen:
                    raise ValueError(f"the same entry stands at byte {seen[key]}")
                seen[key] = at
                yield row_record(key, entry, folder, options)
            except ValueError as error:
                yield Rejected(part.path, key, str(error))
    except (OSError, ValueError) as error:
        yield Rejected(part.path, f"byte {part.start}", f"the file has changed or cannot be read: {error}")


def _name(entry: Any) -> str:
    """Returns the id of an entry, "" if it has none; raises ValueError if the entry or its id is malformed."""
    if isinstance(entry, ValueError):
        raise entry
    if not isinstance(entry, dict):
        raise ValueError(f"an entry is {shown(entry)}, not an object")
    name = entry.get("id")
    if name is None:
        return ""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"the id is {shown(name)}, not text or a whole number")
    return text_of(str(name), "the id")


def _is_list(path: epath.Path) -> bool:
    """Returns whether the file is one JSON list; False for an object a line. Raises ValueError if it is neither."""
    if path.name.lower().endswith(".jsonl"):
        return False
    with opened(path) as file:
        first = file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        if first[:1] == b"[":
            return True
        if first[:1] == b"{":
            try:
                # Some data sets with one object a line are published as .json.
                json.loads(first.split(b"\n", 1)[0])
                return False
            except (ValueError, RecursionError):
                pass
    raise ValueError(f"{path} holds neither a JSON list nor one object a line: see the format `llava` in docs/data.md")


_DECODER = json.JSONDecoder(strict=False, parse_int=whole_number)


def _element(text: str, at: int) -> tuple[Any, int]:
    """Returns the JSON value at `at` and where it ends; a ValueError in its place if it nests too deep.

    Raises:
      JSONDecodeError: the JSON is broken.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        depth = 0
        while found := _BRACKETS.match(text, at):
            run = len(found[1])
            if found[1][0] in "}]":
                if run >= depth:
                    return ValueError("it nests too deep"), found.start(1) + depth
                run = -run
            depth, at = depth + run, found.end()
        raise json.JSONDecodeError("Unbalanced brackets", text, at) from None


def _scan(path: epath.Path) -> Iterator[tuple[int, int]]:
    """Yields the range of bytes [start, end) of each element of a list, with one chunk and one element in memory.

    The file is decoded as Latin-1: each byte is one character, and JSON's punctuation is the same as in UTF-8.
    """
    with opened(path) as file:
        text, base, first = file.read(_CHUNK).decode("latin-1"), 0, True
        at = text.index("[") + 1
        while True:
            try:
                begin = _next(text, at, first)
                if begin < 0:
                    break
                _, end = _element(text, begin)
                if end == len(text):  # a number may go on in the next chunk
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            except json.JSONDecodeError as error:
                chunk = file.read(_CHUNK)
                if not chunk or len(text) - at > MAX_ENTRY:
                    where = f"byte {base + error.pos} ({error.msg})"
                    raise ValueError(f"the JSON of {path} is cut or broken at {where}: copy it again") from None
                text, base, at = text[at:] + chunk.decode("latin-1"), base + at, 0
                continue
            yield base + begin, base + end
            at, first = end, False
        if text[at:].strip(" \t\r\n") != "]" or file.read(_CHUNK).strip():
            raise ValueError(f"{path} goes on after its list, which ends after byte {base + at}: copy it again")


def _next(text: str, at: int, first: bool) -> int:
    """Returns where the next element of a list begins; -1 at the end of the list."""
    at = _SPACE.match(text, at).end()
    if text.startswith("]", at):
        return -1
    if first:
        return at
    if not text.startswith(",", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    return _SPACE.match(text, at + 1).end()


def _list_entries(part: Part) -> Iterator[tuple[int, bytes, Any]]:
    """Yields (first byte, bytes, value) of each element in a part of a list; a broken one's value is a ValueError."""
    with opened(epath.Path(part.path)) as file:
        file.seek(part.start)
        text = file.read(part.stop - part.start).decode("latin-1")
    at = 0
    while at < len(text):
        try:
            value, end = _element(text, at)
        except json.JSONDecodeError as error:
            yield part.start + at, b"", ValueError(f"the file has changed: {error.msg}")
            return
        raw = text[at:end].encode("latin-1")
        if not raw.isascii() and not isinstance(value, ValueError):
            value = _value(raw)
        yield part.start + at, raw, value
        at = _SPACE.match(text, end).end()
        at = _SPACE.match(text, at + 1).end()  # the comma


def _line_entries(part: Part) -> Iterator[tuple[int, bytes, Any]]:
    """Yields (first byte, bytes, value) of each line that begins in a part; a broken one's value is a ValueError."""
    with opened(epath.Path(part.path)) as file:
        at = part.start
        if at:
            file.seek(at - 1)
            at += next(lines(file, 0), (1, None))[0] - 1
        for length, line in lines(file, MAX_ENTRY):
            if at >= part.stop:
                return
            if line is None:
                yield at, b"", ValueError(f"the line is over {MAX_ENTRY >> 20} MB")
            elif line := line.removeprefix(b"\xef\xbb\xbf").strip():
                yield at, line, _value(line)
            at += length


def _value(raw: bytes) -> Any:
    try:
        return loads(raw)
    except ValueError as error:
        return error
