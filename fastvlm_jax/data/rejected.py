"""The entries of a source that became no record: OUTPUT/rejected.jsonl, and their reasons summed up."""

import collections
import json
import os
import re
from collections.abc import Iterable

from etils import epath

FILE = "rejected.jsonl"  # {"split", "file", "key", "reason"} a line
SHOWN = 10  # reasons

Reasons = tuple[tuple[int, str], ...]  # how many, and one of them; the most frequent first


def split_of(line: str) -> str:
    """Returns the split that a line of rejected.jsonl is about, "" for another line."""
    try:
        return json.loads(line)["split"]
    except (ValueError, KeyError, TypeError):  # not a line of ours
        return ""


def read_reasons(folder: str | os.PathLike, split: str) -> tuple[int, Reasons]:
    """Returns how many entries of a split were rejected, and the most frequent reasons."""
    path = epath.Path(folder) / FILE
    if not path.is_file():
        return 0, ()
    with path.open() as lines:
        entries = (json.loads(line) for line in lines if split_of(line) == split)
        return most_frequent(str(entry.get("reason", "")) for entry in entries)


def most_frequent(reasons: Iterable[str]) -> tuple[int, Reasons]:
    """Returns how many reasons there are, and of those that differ by numbers and quoted names only, one each."""
    counts, examples = collections.Counter(), {}
    for reason in reasons:
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\S*[\d/]\S*", "*", reason)
        counts[kind] += 1
        examples.setdefault(kind, reason)
    return counts.total(), tuple((count, examples[kind]) for kind, count in counts.most_common(SHOWN))
