"""Writes gpu.json and gpu.md from the parts that launch/bench_gpu.sh has run so far: gpu_table.py PARTS OUTPUT."""

import json
import pathlib
import sys
from typing import Any

GIB = 2**30
NAMES = {
    "attention": "Attention",
    "memory": "Memory of the step, predicted by arithmetic",
    "step": "Training step",
    "ttft": "Time to the first token",
}


def read(parts: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns what is known of each part that ran: status, seconds, limit, command, found (its JSON or None), told."""
    found = {}
    for name in NAMES:
        file = parts / f"{name}.status"
        if not file.is_file():
            continue
        status, seconds, limit, command = file.read_text().rstrip("\n").split(" ", 3)
        result = parts / f"{name}.json"
        lines = (parts / f"{name}.err").read_text(errors="replace").strip().splitlines()
        found[name] = {
            "status": int(status),
            "seconds": int(seconds),
            "limit": int(limit),
            "command": command.replace(f"{parts}/", ""),
            "error": ""
            if status == "0"
            else f"outlasted {limit} s"
            if status in ("124", "137")
            else (lines or [""])[-1],
            "found": json.loads(result.read_text()) if result.is_file() else None,
            "told": (parts / f"{name}.out").read_text(errors="replace").strip(),
        }
    return found


def memory(found: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """Returns predicted and measured bytes of the step and their ratio; None unless both parts have their figures."""
    both = [found.get(name, {}).get("found") for name in ("memory", "step")]
    if None in both:
        return None
    predicted, measured = both[0]["memory"]["total"], both[1]["peak_bytes"]
    return {"predicted": predicted, "measured": measured, "predicted_over_measured": predicted / measured}


def text(found: dict[str, dict[str, Any]]) -> str:
    """Returns the tables of all parts in markdown."""
    devices = [part["found"]["device"] for part in found.values() if part["found"] and "device" in part["found"]]
    lines = [f"# Measured on {devices[0] if devices else 'a device that no part could name'}", ""]
    for name, part in found.items():
        lines += [f"## {NAMES[name]}", "", f"`{part['command']}`, {part['seconds']} s", ""]
        if part["status"]:
            lines += [f"**Failed with status {part['status']}: {part['error']}**", ""]
        if part["told"]:
            lines += [f"```\n{part['told']}\n```" if name == "memory" else part["told"], ""]
        if name == "step" and (held := memory(found)):
            lines += [
                f"Memory: {held['predicted'] / GIB:.2f} GiB predicted by arithmetic, {held['measured'] / GIB:.2f} GiB "
                f"at its peak ({part['found']['peak_is']}): {held['predicted_over_measured']:.2f} times.",
                "",
            ]
    return "\n".join(lines)


def main(parts: pathlib.Path, output: pathlib.Path) -> None:
    """Writes both files."""
    found = read(parts)
    content = {name: {key: value for key, value in part.items() if key != "told"} for name, part in found.items()}
    (output / "gpu.json").write_text(json.dumps({"parts": content, "memory": memory(found)}, indent=2) + "\n")
    (output / "gpu.md").write_text(text(found))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
