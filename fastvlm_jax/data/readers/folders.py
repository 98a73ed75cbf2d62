"""Finds the files with a given suffix in nested folders."""

import itertools
from collections.abc import Iterator

from etils import epath

_DEPTH = 4  # levels of folders that are searched
# Suffixes that folders do not have: in a bucket, each is_dir() costs a round trip.
_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".txt", ".json", ".jsonl", ".tar", ".md", ".zip", ".csv", ".npz")
_GLANCE = 500  # names of a folder in a first look; of these, the first 1/20 may be folders to enter


def below(path: epath.Path, suffix: str) -> list[epath.Path]:
    """Returns the files in or below a folder that end in `suffix`: by name, before the files of its subfolders."""
    return list(_walk(path, suffix, _DEPTH, None))


def any_below(path: epath.Path, suffix: str) -> bool:
    """Returns whether a look at the first names in a folder and its subfolders finds a file that ends in `suffix`."""
    return next(_walk(path, suffix, 3, _GLANCE), None) is not None


def _walk(path: epath.Path, suffix: str, depth: int, limit: int | None) -> Iterator[epath.Path]:
    children = sorted(itertools.islice(path.iterdir(), limit), key=lambda child: child.name)
    children = [child for child in children if not child.name.startswith(".")]
    for child in children:
        if child.name.lower().endswith(suffix) and not child.is_dir():
            yield child
    if depth > 1:
        for child in children[: limit and limit // 20]:
            if not child.name.lower().endswith((suffix, *_FILES)) and child.is_dir():
                yield from _walk(child, suffix, depth - 1, limit)
