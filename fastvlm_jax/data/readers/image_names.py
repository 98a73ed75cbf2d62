"""Understands the names of images as different systems write them, and tells which lead out of the images' folder.

name in the list               also tried, in this order, if there is no file of that very name
"a.jpg "                       a.jpg                          spaces and line ends around it
sub\\a.jpg                      sub/a.jpg                      a list made on Windows
a%20b.jpg                      a b.jpg                        a list of addresses
é.jpg, e and accent apart      é.jpg, one letter              a list or files from a Mac (Unicode NFC and NFD)
file:///data/images/a.jpg      /data/images/a.jpg             which a folder /data/images has as a.jpg
"""

import os
import posixpath
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable

_DISK = re.compile(r"/?[A-Za-z]:[\\/]")
_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def readings(name: str) -> list[str]:
    """Returns the paths that `name` may mean, without repeats: as it stands first, most changed last."""
    if name.lower().startswith("file://"):
        return [urllib.parse.unquote(name[len("file://") :].removeprefix("localhost"))]
    found = [name]
    found.append(found[-1].strip())
    found.append(found[-1].replace("\\", "/"))
    found.append(urllib.parse.unquote(found[-1]))
    found += [unicodedata.normalize(form, found[-1]) for form in ("NFC", "NFD")]
    return list(dict.fromkeys(found))


def inside(folders: Iterable[str], name: str) -> str | None:
    """Returns the path of `name` relative to a folder; None if it leads out of it.

    `.` and `..` are resolved in the text alone: links are not looked at.

    Args:
      folders: the absolute paths or the address of the folder, without a slash at the end.
      name: path, relative to the folder or absolute, or an address.
    """
    for folder in folders:
        path = posixpath.normpath(name if "://" in name else posixpath.join(folder, os.path.expanduser(name)))
        start = posixpath.join(posixpath.normpath(folder), "")
        if path.startswith(start):
            return path.removeprefix(start)
    return None


def is_on_windows(name: str) -> bool:
    """Returns whether `name` begins with the letter of a disk, as in C:\\data\\a.jpg."""
    return bool(_DISK.match(name))


def near(path: str) -> list[str]:
    """Returns the paths that a file may have which a list calls `path`: other case, other suffix, fewer folders."""
    stem, suffix = posixpath.splitext(path)
    found = [stem + other for other in (suffix.lower(), suffix.upper(), *_SUFFIXES)]
    found += [path.lower(), path.upper(), path.partition("/")[2], posixpath.basename(path)]
    return [other for other in dict.fromkeys(found) if other not in ("", path)]
