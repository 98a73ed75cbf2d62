"""Times the forms of attention on this machine: python -m fastvlm_jax.bench.attention [--lengths N,N] [--output FILE]

Rows of one segment with FastVLM-0.5B's heads, in bfloat16. `plain` stores the scores; `cudnn` is cuDNN's flash
attention, which needs an NVIDIA GPU (kernels/attention.py). The forms take turns, call by call; times are medians.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from fastvlm_jax.bench import clock
from fastvlm_jax.bench.page import markdown_table, milliseconds
from fastvlm_jax.files import write_json
from fastvlm_jax.kernels.attention import cudnn_attention, cudnn_supports, plain

KV_HEADS, GROUPS, HEAD = 2, 7, 64  # of Qwen2-0.5B


def forward_and_backward(form, q, k, v, segments, cotangent):
    """Returns the gradients of queries, keys and values."""
    return jax.vjp(lambda q, k, v: form(q, k, v, segments, segments), q, k, v)[1](cotangent)


def measure(rows: int, length: int, runs: int) -> list[dict[str, Any]]:
    """Returns the figures of one length, JSON-ready: forward, and both passes; "cudnn" is None without a GPU."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, KV_HEADS, GROUPS, HEAD), *[(rows, length, KV_HEADS, HEAD)] * 2]
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=False))
    segments = jnp.ones((rows, length), jnp.int32)
    forms = {"plain": plain} | ({"cudnn": cudnn_attention} if cudnn_supports(q, k) else {})
    found = []
    for name, passes in (("forward", 1), ("forward and backward", 3.5)):
        calls = {}
        for form, function in forms.items():
            if passes == 1:
                args = (q, k, v, segments, segments)
                program, _ = clock.compile_ahead(jax.jit(function), *args)
            else:
                args = (q, k, v, segments, q)
                program, _ = clock.compile_ahead(jax.jit(functools.partial(forward_and_backward, function)), *args)
            calls[form] = functools.partial(program, *args)
        times = clock.take_turns(calls, runs, 3)
        # Causal: half of the pairs; two products forward, five backward (with the scores again).
        flop = passes * 2 * 2 * rows * KV_HEADS * GROUPS * HEAD * length * (length + 1) / 2
        row = {"length": length, "rows": rows, "pass": name, "flops": flop, "plain": clock.spread(times["plain"])}
        row["cudnn"] = clock.spread(times["cudnn"]) if "cudnn" in times else None
        row["ratio"] = float(np.median(np.array(times["plain"]) / times["cudnn"])) if "cudnn" in times else None
        found.append(row)
    return found


def text(found: dict[str, Any]) -> str:
    """Returns the figures as a title and a table in markdown."""
    rows = []
    for row in found["attention"]:
        cells = [f"{row['length']}", row["pass"]]
        for form in ("plain", "cudnn"):
            seconds = row[form] and row[form]["median"]
            cells += [milliseconds(seconds), f"{row['flops'] / seconds / 1e12:.3g}" if seconds else "-"]
        rows.append([*cells, f"{row['ratio']:.2f}" if row["ratio"] else "-"])
    header = ["tokens", "pass", "plain, ms", "TFLOP/s", "cuDNN, ms", "TFLOP/s", "plain / cuDNN"]
    count = found["attention"][0]["rows"]
    head = f"Attention, measured on {found['device']}: bfloat16, {count} rows, {KV_HEADS * GROUPS} heads of {HEAD}"
    return f"{head}\n\n{markdown_table(header, rows)}"


def main(argv) -> None:
    """Times all lengths, prints the table and writes the JSON file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    asked = flags.FLAGS
    if not all(length.isdigit() and int(length) for length in asked.lengths):
        raise app.UsageError(f"--lengths={','.join(asked.lengths)}: write numbers of tokens, as 512,1024")
    found: dict[str, Any] = {
        "device": clock.device_name(jax.devices()[0]),
        "versions": clock.versions(),
        "attention": [],
    }
    for length in map(int, asked.lengths):
        found["attention"] += measure(asked.rows, length, asked.runs)
        if asked.output:  # after each length, so that a run that is stopped leaves what it has
            write_json(asked.output, found)
    print(text(found))


if __name__ == "__main__":
    flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "tokens of a row")
    flags.DEFINE_integer("rows", 4, "rows", lower_bound=1)
    flags.DEFINE_integer("runs", 20, "runs on the clock", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the figures")
    app.run(main)
