"""Writes docs/preflight.md: `python -m fastvlm_jax.preflight.table [--folder DIR] [--output FILE.md] [--only WORD]`.

Each case is one `fastvlm preflight` in its own process, with its JSON in the folder. A case that has its JSON is not
compiled again, so the command can be stopped and continued. All cases take some hours on two cores; the tables are
rewritten after each case.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import app, flags

from fastvlm_jax.chips import GB
from fastvlm_jax.files import write_whole
from fastvlm_jax.preflight.describe import flop, gib, ms, short


class Case(NamedTuple):
    """Describes one compilation.

    Attributes:
      table: key in TITLES of the table that shows it.
      config: config file and size.
      topology: slice to compile for.
      more: further flags of `fastvlm preflight`.
    """

    table: str
    config: str
    topology: str
    more: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        return self.config.rpartition(":")[2]

    @property
    def name(self) -> str:
        words = [self.table, self.config.replace("/", "-"), self.topology.replace(":", "-")]
        for flag in self.more:
            name, _, value = flag.partition("=")
            if name in ("--config.mesh", "--rows"):
                words.append(value.replace(",", "x"))
        return "_".join(words).replace("configs-", "").replace(".py:", "-")


def _batch(groups: int, images: int, length: int) -> tuple[str, ...]:
    return (
        f"--config.data.groups={groups}", f"--config.data.images_per_group={images}",
        f"--config.data.row_length={length}",
    )  # fmt: skip


STAGE2, STAGE1 = "configs/stage2_instruct.py", "configs/stage1_align.py"
STAGE0 = "configs/stage0_clip.py"
ENCODER = ("--mode=encoder", "--top=30", "--config.mesh=1,1,1,1")
BRANCHED = ("--config.model.vision.form=branched", "--config.model.vision.batch_norm=train")
CASES = (
    Case("encoder", f"{STAGE2}:0.5b", "v5e:1x1", (*ENCODER, "--rows=8")),
    Case("encoder-branched", f"{STAGE2}:0.5b", "v5e:1x1", (*ENCODER, "--rows=8", *BRANCHED)),
    Case("stage2", f"{STAGE2}:0.5b", "v5e:4x4"),
    Case("stage2", f"{STAGE2}:1.5b", "v5e:4x8"),
    Case("stage2", f"{STAGE2}:1.5b", "v5e:4x4"),
    Case("stage2", f"{STAGE2}:7b", "v5e:4x8"),
    Case("stage2", f"{STAGE2}:7b", "v5e:8x8", _batch(64, 2, 1024)),
    Case("stage2", f"{STAGE2}:7b", "v5e:8x8", ("--config.mesh=1,4,16,1", *_batch(64, 2, 1024))),
    Case("stage2", f"{STAGE2}:7b", "v5p:2x2x4"),
    Case("stage1", f"{STAGE1}:0.5b", "v5e:4x4"),
    Case("scale", f"{STAGE2}:0.5b", "v5e:4x4", ("--config.mesh=1,1,16,1", *_batch(32, 4, 2048))),
    Case("scale", f"{STAGE2}:0.5b", "v5e:8x8", ("--config.mesh=1,4,16,1", *_batch(128, 4, 2048))),
    Case("scale", f"{STAGE2}:0.5b", "v5e:16x16", ("--config.mesh=1,16,16,1", *_batch(512, 4, 2048))),
    Case("stage2", f"{STAGE2}:0.5b", "v5p:2x2x1"),
    Case("stage2", f"{STAGE2}:0.5b", "v6e:2x4"),
    Case("stage2", f"{STAGE2}:1.5b", "v5p:2x2x2"),
    Case("stage2", f"{STAGE2}:1.5b", "v6e:4x4"),
    Case("stage2", f"{STAGE2}:7b", "v5p:2x2x2"),
    Case("stage2", f"{STAGE2}:7b", "v6e:8x8", _batch(64, 2, 1024)),
    Case("stage1", f"{STAGE1}:1.5b", "v5e:4x4"),
    Case("stage1", f"{STAGE1}:7b", "v5e:4x8"),
    *(Case("images", f"{STAGE2}:0.5b", "v5e:1x1", (*ENCODER, f"--rows={rows}")) for rows in (1, 2, 4, 16)),
    *(Case("stage0", f"{STAGE0}:s3", slices) for slices in ("v5e:16x16", "v5p:4x4x8", "v6e:8x16")),
    Case("stage0", f"{STAGE0}:s3/12m", "v5e:4x4", ("--config.accumulate=2",)),
    Case("generate", f"{STAGE2}:0.5b", "v5e:1x1", ("--mode=generate", "--config.mesh=1,1,1,1")),
    Case("generate", f"{STAGE2}:1.5b", "v5e:1x1", ("--mode=generate", "--config.mesh=1,1,1,1")),
    Case("generate", f"{STAGE2}:7b", "v5e:2x2", ("--mode=generate", "--config.mesh=1,1,1,4")),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Compiles the missing cases and writes the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    folder, output = pathlib.Path(flags.FLAGS.folder), pathlib.Path(flags.FLAGS.output)
    folder.mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(CASES):
        file = folder / f"{case.name}.json"
        if not file.is_file() and flags.FLAGS.only in case.name:
            print(f"{i + 1}/{len(CASES)} {case.name}", flush=True)
            _compile(case, file)
        write(folder, output)


def _compile(case: Case, file: pathlib.Path) -> None:
    command = [
        sys.executable, "-m", "fastvlm_jax", "preflight", f"--config={case.config}", f"--topology={case.topology}",
        f"--output={file}", "--top=20", *case.more,
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    # A program that does not fit has a file too; no file means an error.
    failed = f"failed: {done.stderr.strip().splitlines()[-1:]}"
    print(f"  {time.monotonic() - begin:.0f} s" if file.is_file() else f"  {failed}", flush=True)


def write(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the markdown document from the results in the folder."""
    files = {case: folder / f"{case.name}.json" for case in CASES}
    found = {case: json.loads(file.read_text()) for case, file in files.items() if file.is_file()}
    write_whole(output, text(found).encode())


def text(found: dict[Case, dict[str, Any]]) -> str:
    """Returns the document as markdown."""
    parts = [INTRODUCTION]
    for table, title in TITLES.items():
        rows = {case: report for case, report in found.items() if case.table == table}
        if not rows:
            continue
        parts.append(f"## {title}\n")
        if table == "images":
            parts.append(_images([*(r for case, r in found.items() if case.table == "encoder"), *rows.values()]))
        elif table.startswith("encoder"):
            parts += [_encoder(report) for report in rows.values()]
        elif table == "generate":
            parts.append(_generation(rows))
        elif table == "stage0":
            parts.append(_pairs(rows))
        else:
            parts.append(_steps(rows))
        if table == "scale":
            parts.append(_scaling(rows))
    parts.append(_largest(found))
    return "\n".join(parts)


INTRODUCTION = """# Memory and time of the recipes, estimated by the TPU compiler

Generated by `python -m fastvlm_jax.preflight.table`, not written by hand. Every row is a real program, compiled for its
slice on a machine without a TPU; the rows of the stages are the training step that `fastvlm train` runs. **All times
are estimates**: the compiler's cycles, with every loop counted as often as it runs, and for transfers their bytes over
the published bandwidth of the slice's links. Nothing here was measured on a TPU.

The tables below were compiled before the encoder had kernels of its own. [kernels.md](kernels.md) has the figures with
them: on v5e the encoder's forward and backward pass takes 0.44 of what the tables say, with one image a chip 0.24; a
step of stage 2 of 0.5B on `v5e:4x4` takes 424 ms.

The columns of the stages:

- `mesh` is replica x data x fsdp x tensor; `groups x images` are the groups of a batch and the image slots of a group.
- `state`, `activations`, `total GiB` and `limit` are memory of one device, in GiB. `activations` are everything that
  lives during a step besides the state and the batch.
- `step` is the time as the compiler scheduled the step, `hidden` the time if every transfer ran beside the computation,
  `serial` the time if none did. `ICI` is the time of all transfers between the chips of a slice. `binding` is what
  limits the step.
- `MFU` is based on the model's FLOPs, without recomputation. The figures in brackets are over the computing time of the
  encoder or the LLM alone.
- `FLOPs` is the ratio of the compiled program's FLOPs to the count of `fastvlm_jax/models/flops.py` with recomputation:
  a check of that count.
- `chip-hours` are the hours for the stage's data, times the number of chips.

What `fastvlm preflight` prints, in the order of its report:

- `state` is parameters, optimizer slots and statistics; `batch` is the input of a step.
- `model` FLOPs are those that a step requires; `hardware` FLOPs include what the backward pass computes again.
- `as scheduled`, `transfers hidden` and `transfers serial` are the columns `step`, `hidden` and `serial` above;
  `computing` is the time without any transfer.
- `roofline` is the least time that each unit needs: the matrix units, the memory (HBM), the links.
- `binding` is the longest term of the roofline, or "vector units and layout" if computing takes over 1.5 times as long.
- `collectives` are transfers between chips: their kind, the mesh axes that they run along, how many a step has, and how
  many of them run beside the computation (`overlapped`).
- `MFU` (model FLOPs utilization) is the model's FLOPs over what the chips could do at their peak in that time.

The command for one row is `fastvlm preflight --config configs/stage2_instruct.py:0.5b --topology v5e:4x4`.
`fastvlm_jax/preflight/estimate.py` shows how the estimates are made.

Limits of the estimates:

- The compiler gives no cycles for kernels in Pallas, such as attention. Each is compiled alone once more and counted by
  its final schedule: its bundles of instructions, one a cycle, times the turns of loops and of the grid; or, if longer,
  the time of the matrix units, or that of the memory (HBM) for all blocks. `kernels` in the report tells which. Stalls
  do not show, and code that is skipped at some steps, such as blocks that a causal mask hides, counts at all of them.
- Input, checkpoints and logging are left out.
- The compiler is libtpu 0.0.52. On a TPU VM, `pip install 'jax[tpu]'` installs the version of libtpu that the release
  of JAX names.
"""
TITLES = {
    "stage2": "Stage 2 at 1024 px, global batch 128",
    "stage1": "Stage 1 at 256 px, global batch 256",
    "stage0": "Stage 0: contrastive pretraining of both towers",
    "scale": "From 16 to 256 chips at 8 images a chip",
    "generate": "Generation: an image of 1024 px and 64 text tokens, parameters in bfloat16",
    "encoder": "The encoder alone: forward + backward, 1024 px, 8 images on one v5e chip",
    "images": "The encoder by images a chip",
    "encoder-branched": "The encoder alone in training form, with batch statistics: 8 images on one v5e chip",
}
SHOWN = ("vision", "llm", "loss", "optimizer")


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def _steps(found: dict[Case, dict[str, Any]]) -> str:
    rows = [
        ["size", "slice", "mesh", "groups x images", "state", "activations", "total GiB", "limit", "fits", "step",
         "hidden", "serial", "ICI", "binding", "images/s", "MFU (encoder, LLM)", "FLOPs", "chip-hours"],
    ]  # fmt: skip
    for case, r in sorted(found.items(), key=lambda item: float(item[0].size.rstrip("b"))):
        m, b = r["memory"], r["batch"]
        row = [
            case.size, case.topology, "x".join(map(str, r["mesh"].values())),
            f"{b['groups']} x {b['images'] // b['groups']}", gib(m["state"]), gib(m["activations"]), gib(m["total"]),
            gib(m["limit"]), "yes" if m["fits"] else "**no**",
        ]  # fmt: skip
        if "time" in r:
            t, rates = r["time"], r["rates"]
            row += [ms(t[key]) for key in ("scheduled_s", "hidden_s", "serial_s")]
            row += [ms(t["roofline"]["ICI"]), _binds(t), f"{rates['images/s']:,.0f}"]
            row += [f"{rates['mfu']:.1%} ({rates['mfu_encoder']:.1%}, {rates['mfu_llm']:.1%})"]
            row += [f"{r['flops']['compiled_over_hardware']:.2f}"]
            hours = r["stage"]["chip_hours"] if "stage" in r else None
            row += ["-" if hours is None else f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return markdown(rows)


def _pairs(found: dict[Case, dict[str, Any]]) -> str:
    rows = [
        ["size", "slice", "batch", "accumulate", "state", "activations", "total GiB", "limit", "fits", "step",
         "loss", "images/s", "MFU (image tower, text tower)", "chip-hours", "largest", "second"],
    ]  # fmt: skip
    for case, r in found.items():
        m, b = r["memory"], r["batch"]
        row = [
            case.size, case.topology, f"{b['images']:,}", str(b["accumulate"]), gib(m["state"]), gib(m["activations"]),
            gib(m["total"]), gib(m["limit"]), "yes" if m["fits"] else "**no**",
        ]  # fmt: skip
        if "time" in r:
            t, rates = r["time"], r["rates"]
            loss = t["by_part"]["loss"]
            row += [ms(t["scheduled_s"]), f"{ms(loss)}, {loss / t['scheduled_s']:.1%}", f"{rates['images/s']:,.0f}"]
            row += [f"{rates['mfu']:.1%} ({rates['mfu_encoder']:.1%}, {rates['mfu_text']:.1%})"]
            row += [f"{r['stage']['chip_hours']:,.0f}"]
            row += [f"`{short(o['operation'])}` {o['share']:.1%}" for o in r["operations"][:2]]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return (
        "Both towers of MobileCLIP-S3 at 256 px; DataCompDR-1B for 200,000 steps, -12M (`s3/12m`) for 30,000. "
        '"loss" is the computing time of the distillation of both captions, and its share of the step.\n\n'
        + markdown(rows)
    )


def _binds(times: dict[str, Any]) -> str:
    return times["binding"].partition(" (")[0]


def _scaling(found: dict[Case, dict[str, Any]]) -> str:
    """Compares the step time on each slice with the first one, and names what limits it."""
    (first, base), *others = found.items()
    more = [
        f"{case.topology} {r['time']['scheduled_s'] / base['time']['scheduled_s'] - 1:+.1%} ({_binds(r['time'])} binds)"
        for case, r in others
    ]
    return (
        f"Estimated step time relative to {first.topology}, with the same number of images a chip: {', '.join(more)}.\n"
    )


def _generation(found: dict[Case, dict[str, Any]]) -> str:
    rows = [["size", "slice", "mesh", "total GiB", "limit", "fits", "time to first token", "encoder", "LLM",
             "time of each further token", "least by HBM", "binding"]]  # fmt: skip
    for case, r in found.items():
        m, row = r["memory"], [case.size, case.topology, "x".join(map(str, r["mesh"].values()))]
        row += [gib(m["total"]), gib(m["limit"]), "yes" if m["fits"] else "**no**"]
        if "time" in r:
            first, further = r["time"]["prefill"], r["time"]["decode"]
            row += [ms(first["scheduled_s"]), *(ms(first["by_part"][name]) for name in ("vision", "llm"))]
            row += [
                ms(further["scheduled_s"]),
                ms(further["weights_s"]),
                f"{_binds(first)}; {_binds(further)}",
            ]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return markdown(rows)


def _images(found: list[dict[str, Any]]) -> str:
    rows = [["images", "M cycles an image", "GiB of temporaries"]]
    for r in sorted(found, key=lambda r: r["batch"]["images"]):
        temporaries = r["memory"]["compiler"]["temporaries"]
        rows.append([str(r["batch"]["images"]), f"{_cycles(r) / 1e6:,.1f}", gib(temporaries)])
    return (
        "Forward and backward pass on one v5e chip; with 8 images the chip's tiles of 8 x 128 are full.\n\n"
        + markdown(rows)
    )


def _cycles(r: dict[str, Any]) -> float:
    """Returns the estimated cycles of one image from the encoder's report."""
    return r["time"]["compute_s"] * r["topology"]["clock_hz"] / r["batch"]["images"]


def _encoder(r: dict[str, Any]) -> str:
    images, cycles = r["batch"]["images"], _cycles(r)
    head = (
        f"{cycles / 1e6:,.1f} M cycles an image ({ms(cycles / r['topology']['clock_hz'])}), "
        f"{r['memory']['compiler']['temporaries'] / GB:.2f} GB of temporaries, {flop(r['flops']['compiled'])}.\n"
    )
    rows = [["operation", "M cycles an image", "share"]]
    rows += [
        [f"`{short(o['operation'])}`", f"{o['cycles'] / images / 1e6:,.2f}", f"{o['share']:.1%}"]
        for o in r["operations"]
    ]
    return head + "\n" + markdown(rows)


def _largest(found: dict[Case, dict[str, Any]]) -> str:
    """Returns a table of the two largest costs of each size in stage 2, on its first slice."""
    rows, seen = [["size, slice", "largest", "second", "computation: vision, LLM, loss, optimizer"]], set()
    for case, r in found.items():
        size = case.size
        if case.table == "stage2" and "time" in r and size not in seen:
            seen.add(size)
            costs = [f"`{short(o['operation'])}` {o['share']:.1%}" for o in r["operations"][:2]]
            parts = (r["time"]["by_part"][name] / r["time"]["compute_s"] for name in SHOWN)
            rows.append([f"{size}, {case.topology}", *costs, ", ".join(f"{part:.0%}" for part in parts)])
    return "## The two largest costs of a step\n\n" + markdown(rows)


if __name__ == "__main__":
    flags.DEFINE_string("folder", "runs/preflight", "folder of the results, one JSON file per case")
    flags.DEFINE_string("output", "docs/preflight.md", "markdown file to write")
    flags.DEFINE_string("only", "", "compile only cases whose name contains this word; empty = all")
    app.run(main)
