"""Reads metrics.jsonl, the scalars of a run by step."""

import json
import pathlib

FILE = "metrics.jsonl"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads the rows of metrics.jsonl, none if there is no such file; leaves out a line that a crash has cut."""
    path = pathlib.Path(workdir) / FILE
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
