"""Files of one kind in a folder of folders."""

import itertools
from collections.abc import Iterator

from etils import epath

_DEPTH = 4  # folders below one another that are looked into
# Names that are certainly no folders: in a bucket, each question costs a round trip.
_FILES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".txt", ".json", ".jsonl", ".tar", ".md", ".zip", ".csv", ".npz")
_GLANCE = 500  # names of a folder, and folders, that a first look takes in


def below(path: epath.Path, suffix: str) -> list[epath.Path]:
    """Returns the files in or below a folder whose names end in `suffix`, in the order of their names."""
    return list(_walk(path, suffix, _DEPTH, None))


def any_below(path: epath.Path, suffix: str) -> bool:
    """Whether a look at the first names in a folder and the folders in it finds a file that ends in `suffix`."""
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
