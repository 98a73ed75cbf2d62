"""Reads OUTPUT/rejected.jsonl, the source entries that became no record, and summarizes the reasons."""

import collections
import json
import os
import re
from collections.abc import Iterable

from etils import epath

FILE = "rejected.jsonl"  # each line: {"split", "file", "key", "reason"}
SHOWN = 10  # kinds of reasons that a summary holds

Reasons = tuple[tuple[int, str], ...]  # (count, example) of each kind, the most frequent first


def split_of(line: str) -> str:
    """Returns the split that a line of rejected.jsonl belongs to, "" for any other text."""
    try:
        return json.loads(line)["split"]
    except (ValueError, KeyError, TypeError):  # not a line of rejected.jsonl
        return ""


def read_reasons(folder: str | os.PathLike, split: str) -> tuple[int, Reasons]:
    """Returns the number of rejected entries of a split, and the most frequent reasons."""
    path = epath.Path(folder) / FILE
    if not path.is_file():
        return 0, ()
    with path.open() as lines:
        entries = (json.loads(line) for line in lines if split_of(line) == split)
        return most_frequent(str(entry.get("reason", "")) for entry in entries)


def most_frequent(reasons: Iterable[str]) -> tuple[int, Reasons]:
    """Returns the number of reasons, and the most frequent kinds of them, each with its count and one example.

    Reasons that differ only in numbers and quoted names are of one kind.
    """
    counts, examples = collections.Counter(), {}
    for reason in reasons:
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/]\S*", "*", reason)
        counts[kind] += 1
        examples.setdefault(kind, reason)
    return counts.total(), tuple((count, examples[kind]) for kind, count in counts.most_common(SHOWN))
