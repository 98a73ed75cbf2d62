"""Formats the report of preflight as aligned text that fits on one screen."""

import re
from typing import Any

from fastvlm_jax.chips import GB, GiB


def table(rows: list[list[str]], indent: str = "  ") -> str:
    """Formats rows as aligned columns: the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        indent
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def si(value: float) -> str:
    """Formats a number with three digits and an SI prefix: 1234567 becomes "1.23M"."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def flop(value: float) -> str:
    """Formats a number of FLOPs: 13.7e12 becomes "13.7 TFLOP"."""
    text = si(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def gib(value: float) -> str:
    return f"{value / GiB:.2f}"


def ms(value: float) -> str:
    return f"{1000 * value:,.1f} ms"


def train_text(report: dict[str, Any]) -> str:
    """Formats the report of a train step, as `fastvlm preflight` prints it."""
    lines = [_head(report), "", _parameters(report), "", _memory(report)]
    if "time" not in report:
        return "\n".join(lines)
    times, rates = report["time"], report["rates"]
    lines += ["", _flops(report), "", _time(times)]
    if report["collectives"]:
        lines += ["", _collectives(report["collectives"])]
    lines += [
        "",
        f"estimated rates: {rates['images/s']:,.1f} images/s, {rates['tokens/s']:,.0f} tokens/s, MFU {rates['mfu']:.1%}"
        f" (encoder {rates['mfu_encoder']:.1%}, {_reader(rates)}, each in its own computing time)",
    ]
    if stage := report.get("stage"):
        of = f" for {si(stage['records'])} records" if stage["records"] else ""
        lines.append(
            f"estimated stage: {stage['steps']:,} steps{of}: {stage['hours']:,.1f} hours, "
            f"{stage['chip_hours']:,.0f} chip-hours"
        )
    else:
        lines.append("estimated stage: number of records unknown; --records=N gives hours and chip-hours")
    if report["operations"]:
        lines += ["", _operations(report["operations"])]
    return "\n".join(lines)


def _reader(rates: dict[str, float]) -> str:
    """Names the model that reads texts, and its MFU."""
    return f"LLM {rates['mfu_llm']:.1%}" if "mfu_llm" in rates else f"text tower {rates['mfu_text']:.1%}"


# Parts of an op_name that JAX adds around the model's layers.
_WRAPPER = re.compile(
    r"(jit|jvp|transpose)\(.*|FastVLM.*|CLIP.*|.*<lambda>|branch_\d+_fun|closed_call|body|cond|shard_map|checkpoint"
)


def short(path: str, width: int = 90) -> str:
    """Shortens an op_name to pass and layer, as "backward vision/stage_1/ffn/fc2/dot_general".

    Of a result longer than `width` characters, only the end is kept.
    """
    *outer, last = path.split("/")
    words = [word for word in outer if not _WRAPPER.fullmatch(word)]
    when = "recomputed" if "rematted_computation" in words else "backward" if "transpose(jvp(" in path else ""
    kept = [word for word in words if word not in ("rematted_computation", "while")] + [last]
    text = "/".join(word for i, word in enumerate(kept) if i == 0 or word != kept[i - 1])
    text = f"{when or 'forward'} {text}" if when or "jvp(" in path else text
    return text if len(text) <= width else "..." + text[3 - width :]


def _operations(found: list[dict[str, Any]]) -> str:
    rows = [["largest costs (estimated)", "M cycles", "share"]]
    rows += [[short(o["operation"]), f"{o['cycles'] / 1e6:,.1f}", f"{o['share']:.1%}"] for o in found]
    return table(rows, "")


def _head(report: dict[str, Any]) -> str:
    t, b, c = report["topology"], report["batch"], report["compile"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    sizes = ", ".join(f"{key} {value}" for key, value in b.items() if key != "accumulate" or value > 1)
    made = (
        "read from the cache" if c["cached"] else f"traced in {c['trace_s']:.0f} s, compiled in {c['compile_s']:.0f} s"
    )
    made += f", kernels counted in {c['count_s']:.0f} s" if c["count_s"] >= 1 else ""
    return (
        f"{report['stage_name'] or 'train step'} on {t['name']}: {t['chips']} chips, mesh {mesh}\n{sizes}\n"
        f"Compiled by the TPU compiler (libtpu {c['libtpu']}, {made}). "
        "Nothing ran on a TPU: every time below is an estimate."
    )


def _parameters(report: dict[str, Any]) -> str:
    counts = report["parameters"]
    return "parameters: " + ", ".join(f"{name} {si(n)}" for name, n in counts.items())


def _memory(report: dict[str, Any]) -> str:
    m = report["memory"]
    rows = [["GiB a device", "state", "batch", "activations", "total", "limit", ""]]
    rows.append(["", *(gib(m[k]) for k in ("state", "batch", "activations", "total", "limit"))])
    rows[1].append("fits" if m["fits"] else "DOES NOT FIT")
    return table(rows, "")


def _flops(report: dict[str, Any]) -> str:
    f = report["flops"]
    parts = [part for part, count in f["hardware"].items() if count]
    rows = [["FLOPs a step, all devices", *parts, "all"]]
    rows += [[n, *(si(f[n][part]) for part in parts), si(sum(f[n].values()))] for n in ("model", "hardware")]
    return table(rows, "") + (
        f"\n  hardware includes recomputation; the compiled program has {si(f['compiled'])}, "
        f"{f['compiled_over_hardware']:.3f} times that"
    )


def _time(times: dict[str, Any]) -> str:
    rows = [["estimated step", "as scheduled", "transfers hidden", "transfers serial", "computing"]]
    rows.append(["", *(ms(times[k]) for k in ("scheduled_s", "hidden_s", "serial_s", "compute_s"))])
    parts = ", ".join(f"{name} {ms(s)}" for name, s in times["by_part"].items() if s > 0)
    bound = ", ".join(f"{name} {ms(s)}" for name, s in times["roofline"].items())
    text = f"{table(rows, '')}\n  computing: {parts}\n  roofline: {bound}\n  binding: {times['binding']}"
    return "\n".join([text, kernels_text(times["kernels"])]) if times["kernels"] else text


def kernels_text(found: list[dict[str, Any]]) -> str:
    """Formats the kernels of a program, with what their cycles are."""
    rows = [["kernels (estimated by their schedules)", "runs", "M cycles", "bound by"]]
    for row in found:
        unknown = f", {row['unknown']} loops of unknown trips counted once" if row["unknown"] else ""
        rows.append([row["kernel"], f"{row['runs']:,}", f"{row['cycles'] / 1e6:,.2f}", row["bound"] + unknown])
    return table(rows)


def _collectives(found: list[dict[str, Any]]) -> str:
    rows = [["collectives a step", "axes", "count", "overlapped", "GB", "estimated"]]
    rows += [
        [c["kind"], c["axes"], str(c["count"]), str(c["asynchronous"]), f"{c['bytes'] / GB:.3f}", ms(c["seconds"])]
        for c in found[:8]
    ]
    return table(rows, "")


def encoder_text(report: dict[str, Any]) -> str:
    """Formats the report of the encoder alone, as `fastvlm preflight --mode=encoder` prints it."""
    lines = [_head(report), "", _memory(report)]
    if "time" in report:
        seconds, images = report["time"]["compute_s"], report["batch"]["images"]
        cycles = seconds * report["topology"]["clock_hz"] * report["topology"]["devices"] / images
        lines += [
            "",
            f"estimated forward and backward pass: {ms(seconds)}, {cycles / 1e6:,.1f} M cycles an image; "
            f"{gib(report['memory']['compiler']['temporaries'])} GiB of temporaries",
            "",
            _operations(report["operations"]),
        ]
        if report["time"]["kernels"]:
            lines += ["", kernels_text(report["time"]["kernels"])]
    return "\n".join(lines)


def generate_text(report: dict[str, Any]) -> str:
    """Formats the report of generation, as `fastvlm preflight --mode=generate` prints it."""
    lines = [_head(report), "", _memory(report)]
    if "time" in report:
        prefill, decode = report["time"]["prefill"], report["time"].get("decode")
        lines += ["", f"estimated time to first token: {ms(prefill['scheduled_s'])}; binding: {prefill['binding']}"]
        parts = ", ".join(f"{name} {ms(s)}" for name, s in prefill["by_part"].items() if s > 0)
        lines.append(f"  {parts}")
        if prefill["kernels"]:
            lines.append(kernels_text(prefill["kernels"]))
        if decode:
            rate = report["rates"]["tokens/s"]
            lines.append(
                f"estimated time of each further token: {ms(decode['scheduled_s'])} ({rate:,.0f} tokens/s over all "
                f"rows); binding: {decode['binding']}"
            )
            ratio = decode["scheduled_s"] / decode["weights_s"]
            lines.append(
                f"  {ratio:.2f} times the {ms(decode['weights_s'])} in which HBM brings the LLM's weights once"
            )
    return "\n".join(lines)


def search_text(rows: list[dict[str, Any]]) -> str:
    """Formats the compiled candidates as a table: arithmetic beside the compiler's estimates."""
    cells = [["candidate (arithmetic | compiled, estimated)", "GiB", "step", "GiB", "step", ""]]
    for row in rows:
        step = ms(row["scheduled_s"]) if row["scheduled_s"] is not None else "-"
        own = [gib(row["arithmetic_bytes"]), ms(row["arithmetic_s"]), gib(row["bytes"]), step]
        cells.append([row["settings"], *own, "fits" if row["fits"] else "DOES NOT FIT"])
    return table(cells, "")
