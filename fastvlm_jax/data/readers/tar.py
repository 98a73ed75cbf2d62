"""Finds the members of a tar file header by header, without unpacking them or trusting the sizes that headers claim.

`tarfile` ends silently at a damaged header, and reads whatever size an extended header claims into memory.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
MAX_NAME = 64 << 10  # bytes of an extended header
MAX_SIZE = 1 << 62  # bytes of a member
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_CHUNK = 1 << 20
_MAGIC = b"ustar"
_MAGIC_AT = 257  # byte of a POSIX or GNU header where _MAGIC begins


class Member(NamedTuple):
    """Describes a file in a tar: `size` bytes from byte `at` on; `wrong` says why it cannot be read, "" if it can.

    Damage between two members, or a missing end of the tar, is a member without a name whose `wrong` is set.
    """

    name: str
    at: int
    size: int
    wrong: str = ""


def members(file: IO[bytes], length: int) -> Iterator[Member]:
    """Yields the members of a tar of `length` bytes in order, without folders."""
    at, name, size, ended = 0, None, None, False
    while at + BLOCK <= length:
        file.seek(at)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            # Concatenated tars go on after the end of the first.
            at, ended = _find_header(file, at + BLOCK, length), True
            continue
        ended = False
        header = _header(block)
        if header is None:
            after = _find_header(file, at + BLOCK, length)
            what = "this is no tar file" if (at, after) == (0, length) else f"{after - at} bytes are not a tar header"
            yield Member("", at, after - at, f"{what}: copy it again")
            at, name, size, ended = after, None, None, after == length
            continue
        data, stored = at + BLOCK, header.size
        if header.type in _EXTENDED:
            extended = file.read(stored)
            if header.type == tarfile.XHDTYPE:
                name, size = _pax(extended, name, size)
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                name = extended.rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            stored = stored if size is None else size
            if header.type != tarfile.DIRTYPE:
                member = Member(name or header.name, data, stored)
                yield member._replace(wrong=_wrong(header.type, member, length))
            name, size = None, None  # extended headers apply to one member only
        at = data + (stored + BLOCK - 1) // BLOCK * BLOCK
        if data + stored > length:
            # After a header that claims too much there is another header; in a cut file there is none.
            at, ended = _find_header(file, data, length), header.type not in (tarfile.DIRTYPE, *_EXTENDED)
    if not ended:
        yield Member("", at, 0, "the tar is cut here: copy it again")


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Returns the header in a block; None if it is damaged or claims a size that no tar has."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return header if 0 <= header.size <= (MAX_NAME if header.type in _EXTENDED else MAX_SIZE) else None


def _wrong(kind: bytes, member: Member, length: int) -> str:
    if not member.name:
        return "a file without a name"
    if kind in _LINKS:
        return "is a link"
    if kind not in _FILES:
        return "is not a regular file"
    if member.at + member.size > length:
        return f"claims {member.size} bytes, more than the tar holds: it is cut or damaged"
    return ""


def _find_header(file: IO[bytes], at: int, length: int) -> int:
    """Returns where the next valid header begins, at byte `at` or whole blocks after it; `length` if there is none."""
    while at + BLOCK <= length:
        file.seek(at)
        chunk = file.read(_CHUNK)
        found = chunk.find(_MAGIC, _MAGIC_AT)
        while found >= 0:
            start = found - _MAGIC_AT
            if start % BLOCK == 0 and len(chunk) >= start + BLOCK and _header(chunk[start : start + BLOCK]):
                return at + start
            found = chunk.find(_MAGIC, found + 1)
        at += _CHUNK
    return length


def _pax(data: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Returns name and size, changed by the `LENGTH KEY=VALUE` lines of an extended header."""
    while data:
        digits, _, _ = data[:20].partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        data = data[int(digits) :]
    return name, size
