"""Reads metrics.jsonl, the scalars of a run by step, and other files of rows by step."""

import json
import pathlib
from typing import Any

from fastvlm_jax.files import write_whole

FILE = "metrics.jsonl"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads the rows of metrics.jsonl, see `read_rows`."""
    return read_rows(pathlib.Path(workdir) / FILE)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of a file, none if there is no such file; leaves out a line that a crash has cut."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def keep_until(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Drops the rows behind a step from a file, which is made if there is none, and returns the others."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    lines = "".join(json.dumps(row) + "\n" for row in kept).encode()
    if not path.exists() or path.read_bytes() != lines:
        write_whole(path, lines)
    return kept
