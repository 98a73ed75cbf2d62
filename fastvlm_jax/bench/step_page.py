"""Formats what `fastvlm bench step` measured: text with a table in markdown, and the bars of a picture."""

from typing import Any

from fastvlm_jax.bench.page import markdown_table, milliseconds

GIB = 2**30


def text(found: dict[str, Any]) -> str:
    """Returns the figures of a step as lines and a table in markdown."""
    batch, counts, remat = found["batch"], found["parameters"], found["remat"]
    sizes = ", ".join(f"{key} {value}" for key, value in batch.items() if key != "accumulate" or value > 1)
    lines = [
        title(found),
        "",
        f"{sizes}; parameters {', '.join(f'{name} {count / 1e6:,.1f}M' for name, count in counts.items())}; "
        f"recomputed: encoder {remat['vision']}, language model {remat['llm']}.",
        f"Medians of {found['runs']} runs in turns, after {found['warmup']} warm-ups; compiled before.",
        "",
        markdown_table(["part", "ms", "p10", "p90", "TFLOP", "MFU"], _rows(found)),
        "",
        "Every part is a program of its own, so they need not add up: `rest` is the whole step minus all parts "
        "(below 0: one program saves work). `encoder backward` and `language model` are differences of two programs.",
        "",
        f"- {found['images/s']:,.2f} images/s, {found['tokens/s']:,.0f} tokens/s{_mfu(found)}",
        f"- memory: {found['peak_bytes'] / GIB:.2f} GiB ({found['peak_is']}); the compiled step needs "
        f"{found['program_bytes'] / GIB:.2f} GiB; state {found['state_bytes'] / GIB:.2f} GiB, all gradients "
        f"{found['gradient_bytes'] / GIB:.2f} GiB{_resident(found['resident_bytes'])}",
        "- compiled in " + ", ".join(f"{seconds:.1f} s ({name})" for name, seconds in found["compile_seconds"].items()),
    ]
    for other in found["against"]:
        took = milliseconds(other["step"]["median"])
        notes = "".join(f"; {note}" for note in other["notes"])
        lines.append(f"- {other['name']}: {took} ms a step; ours takes {other['ratio']:.2f} times that{notes}")
    return "\n".join(lines)


def title(found: dict[str, Any]) -> str:
    """Returns one line that says what was measured, and where."""
    devices = f"{found['devices']} x " if found["devices"] > 1 else ""
    return (
        f"A training step{' of ' + found['stage_name'] if found['stage_name'] else ''}, measured on {devices}"
        f"{found['device']}: {found['dtype']}, jax {found['versions']['jax']}"
    )


def bars(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the bars of the picture: the parts, and each whole step beside them; a part below 0 has no bar."""
    parts = {name: max(0.0, part["median"]) for name, part in found["parts"].items()}
    drawn = {"parts, each alone": parts, "whole step": {"whole": found["step"]["median"]}}
    return drawn | {other["name"]: {"whole": other["step"]["median"]} for other in found["against"]}


def _rows(found: dict[str, Any]) -> list[list[str]]:
    whole = {**found["step"], "flops": found["flops"], "mfu": found["mfu"]}
    rows = []
    for name, part in {**found["parts"], "**whole**": whole}.items():
        flop, mfu = part.get("flops"), part.get("mfu")
        rows.append([name, *(_signed(part[key]) for key in ("median", "p10", "p90"))])
        rows[-1] += [f"{flop / 1e12:.3g}" if flop else "-", f"{mfu:.1%}" if mfu else "-"]
    return rows


def _signed(seconds: float) -> str:
    return milliseconds(seconds) if seconds >= 0 else f"-{milliseconds(-seconds)}"


def _resident(resident: dict[str, int | None]) -> str:
    if None in resident.values():
        return ""
    before, most = (resident[name] / GIB for name in ("before", "most"))
    return f"; the process held {most:.2f} GiB at most during the step, {before:.2f} GiB without the state"


def _mfu(found: dict[str, Any]) -> str:
    if found["mfu"] is None:
        return "; no MFU: the peak of this device is not known"
    return f", MFU {found['mfu']:.1%} of {found['peak_flops'] / 1e12:,.0f} TFLOP/s"
