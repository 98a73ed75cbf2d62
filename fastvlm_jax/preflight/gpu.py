"""Estimates by arithmetic what a training step needs of a GPU's memory: no compiler for GPUs takes part, nothing runs.

gpu:80GB        one GPU with 80 GB of memory           gpu:8x80GB        eight of them
cpu             the memory of this machine             cpu:24GB          that of another

The step that `fastvlm train` runs is traced without devices. Parameters and optimizer slots are counted by their
shards, which is exact; the rest is what the traced step holds at its fullest moment, see preflight/liveness.py. No time
is estimated.
"""

import collections
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval

from fastvlm_jax import config_checks, optim, sharding, stage
from fastvlm_jax.chips import GB
from fastvlm_jax.config_values import rows_of
from fastvlm_jax.models import kinds
from fastvlm_jax.preflight import estimate
from fastvlm_jax.preflight.compile import STEPS, device_bytes
from fastvlm_jax.preflight.describe import gib, si, table
from fastvlm_jax.preflight.liveness import peak
from fastvlm_jax.preflight.run import check

PARTS = ("parameters", "optimizer", "batch", "gradients", "activations", "workspace")
OPTIMIZER = ("step", "opt_state", "guard", "average")  # fields of a TrainState that count as the optimizer
# JAX takes this share of a card's memory when it starts, unless one of SHARE_VARIABLES says another.
SHARE, SHARE_VARIABLES = 0.75, ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Compiled steps on few devices need up to this many times the arithmetic (docs/gpu.md).
MARGIN, CPU_MARGIN = 1.25, 1.7


@dataclasses.dataclass(frozen=True)
class Gpus:
    """Describes GPUs, or a CPU: the name that was parsed, their number, and the bytes of one."""

    name: str
    count: int
    bytes: float


def is_arithmetic(name: str) -> bool:
    """Returns whether a topology's name asks for GPUs or a CPU, for which there is arithmetic only."""
    return name.strip().startswith(("gpu:", "cpu"))


def memory_here() -> int:
    """Returns the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_cpu(devices: Gpus) -> bool:
    """Returns whether the devices are a CPU."""
    return devices.name.startswith("cpu")


def margin(devices: Gpus) -> float:
    """Returns how many times the arithmetic a compiled step may need."""
    return CPU_MARGIN if is_cpu(devices) else MARGIN


def share_of(devices: Gpus) -> float:
    """Returns the share of a device's memory that a run may take."""
    return 1.0 if is_cpu(devices) else usable_share()


def usable(devices: Gpus) -> Gpus:
    """Returns devices with the memory that a run may take of each."""
    return dataclasses.replace(devices, bytes=share_of(devices) * devices.bytes)


def parse(name: str) -> Gpus:
    """Parses "gpu:80GB", "gpu:8x80GB", "cpu" (this machine) or "cpu:24GB"; GB is 10**9 bytes.

    Raises:
      ValueError: the name has another form, or says no GPU or no memory.
    """
    if name.strip().startswith("cpu"):
        found = re.fullmatch(r"cpu(?::(\d{1,4}(?:\.\d+)?)GB)?", name.strip())
        size = float(found[1]) * GB if found and found[1] else memory_here() if found else 0
        if not size:
            raise ValueError(f"--topology={name}: write cpu for this machine, cpu:24GB for one with 24 GB of memory")
        return Gpus(name.strip(), 1, size)
    found = re.fullmatch(r"gpu:(?:(\d{1,4})x)?(\d{1,4}(?:\.\d+)?)GB", name.strip())
    count, size = (int(found[1] or 1), float(found[2])) if found else (0, 0.0)
    if not count or not size:
        raise ValueError(f"--topology={name}: write gpu:80GB for a GPU of 80 GB, gpu:8x80GB for eight of them")
    return Gpus(name.strip(), count, size * GB)


def usable_share() -> float:
    """Returns the share of a card's memory that JAX takes: SHARE, or what the environment says.

    Raises:
      ValueError: the environment says no share above 0 and up to 1.
    """
    for name in SHARE_VARIABLES:
        if value := os.environ.get(name):
            if not re.fullmatch(r"(0?\.\d+|1(\.0*)?)", value) or not float(value):
                raise ValueError(f"{name}={value} must be a share above 0 and up to 1, as 0.9")
            return float(value)
    return SHARE


def preflight(config, name: str) -> dict[str, Any]:
    """Returns the arithmetic for a config's training step on GPUs, JSON-ready; `text` formats it.

    Reads neither data nor a parent's weights.

    Raises:
      ValueError: the name has another form, or the mesh does not fit the GPUs or divide the batch or the heads.
    """
    gpus = parse(name)
    config_checks.validate(config)
    share, limit = share_of(gpus), usable(gpus).bytes
    found, mesh, counts = memory(config, gpus)
    total = sum(found.values())
    fits = margin(gpus) * total <= limit
    data, (rows, length) = config.data, rows_of(config)
    return {
        "mode": "train",
        "stage_name": config.stage,
        "estimated_by": "arithmetic",
        "topology": {"name": gpus.name, "gpus": gpus.count, "bytes": gpus.bytes},
        "mesh": dict(mesh.shape),
        "parameters": counts,
        "batch": {
            "groups": data.groups, "images": data.groups * data.images_per_group, "image_size": data.image_size,
            "rows": data.groups * rows, "row_length": length, "accumulate": config.accumulate,
        },
        "memory": {
            **found, "total": total, "margin": margin(gpus), "with_margin": margin(gpus) * total, "limit": limit,
            "share": share, "fits": fits,
        },
        "mends": [] if fits else mends(config, gpus, limit),
    }  # fmt: skip


def memory(config, gpus: Gpus) -> tuple[dict[str, int], Any, dict[str, int]]:
    """Estimates the bytes of each of PARTS on one GPU: (bytes by part, mesh, number of parameters by module).

    A GPU computes its own share of the groups. Along the mesh's tensor axis its activations are counted whole.
    """
    mesh = sharding.abstract_mesh(sharding.mesh_sizes(config.mesh, gpus.count))
    check(config, mesh, gpus, config.data.groups, "data.groups")
    model = kinds.build(**config.model.to_dict())
    shards = math.prod(mesh.shape[axis] for axis in sharding.LOGICAL_AXES["batch"])
    own = config.copy_and_resolve_references()
    own.data.groups = config.data.groups // shards
    live = traced(own, model)
    with jax.sharding.use_abstract_mesh(mesh):
        state = stage.make_step(config, model, mesh, steps=STEPS).abstract
    learning = optim.split(state.params, config.groups)[0]
    whole = max(1, sum(math.prod(x.shape) for x in learning.values()))
    found = {
        "parameters": device_bytes((state.params, state.batch_stats)),
        "optimizer": device_bytes([getattr(state, name) for name in OPTIMIZER]),
        "batch": live["batch"],
        "gradients": round(live["gradients"] * device_bytes(learning) / (_itemsize(config) * whole)),
        "activations": live["activations"],
        "workspace": live["workspace"] + (widened(config, state.params) if gpus.name.startswith("cpu") else 0),
    }
    return found, mesh, estimate.parameters(state.params, config.groups)


def traced(config, model) -> collections.Counter:
    """Returns what the traced step holds at its fullest moment on one device, in bytes by kind."""
    mesh = sharding.abstract_mesh((1, 1, 1, 1))
    sources = 1 if config.data.path else max(1, len(config.data.mixture))
    with jax.sharding.use_abstract_mesh(mesh):
        step = stage.make_step(config, model, mesh, steps=STEPS, num_sources=sources)
        batch = stage.abstract_batch(config, model, mesh)
        jaxpr = jax.make_jaxpr(step.fn)(step.abstract, batch).jaxpr
    # Compilers leave out what nothing reads, as the gradient of a frozen table of words.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    state = step.abstract
    labels = jax.tree.map(lambda _: "parameters", state).replace(
        **{name: jax.tree.map(lambda _: "optimizer", getattr(state, name)) for name in OPTIMIZER}
    )
    labels = jax.tree.leaves((labels, jax.tree.map(lambda _: "batch", batch)))
    # Attention in float32 has no kernel (kernels/attention.py).
    return peak(jaxpr, labels, kernels=config.model.dtype != "float32", kept=("batch",)).kinds


def widened(config, params) -> int:
    """Returns the bytes of float32 copies of narrow kernels, which XLA makes on a CPU before a loop over layers."""
    if config.model.dtype != "float32":
        return 0
    flat = flatten_dict(params, sep="/")
    return sum(4 * math.prod(x.shape) for path, x in flat.items() if path.endswith("/kernel") and x.dtype.itemsize == 2)


def _itemsize(config) -> int:
    return 2 if config.param_dtype == "bfloat16" else 4


def mends(config, gpus: Gpus, usable: float) -> list[str]:
    """Lists settings that would fit by the same arithmetic, each on its own: the first of each kind that does."""
    print("preflight: it does not fit; trying what would, some seconds each", file=sys.stderr, flush=True)
    found, seen = [], set()
    for kind, flags, changed, more in _changes(config, gpus):
        if kind in seen:
            continue
        try:
            total = sum(memory(changed, more)[0].values())
        except ValueError:  # this mesh does not divide the batch or the heads
            continue
        if margin(gpus) * total <= usable:
            seen.add(kind)
            found.append(f"{flags}  {gib(total)} GiB, with the margin {gib(margin(gpus) * total)}")
    return found


def _changes(config, gpus: Gpus) -> Iterator[tuple[str, str, Any, Gpus]]:
    """Yields (kind, flags, changed config, GPUs) of what may be tried, the mildest of each kind first."""

    def change(kind: str, **values):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
        flags = " ".join(f"--config.{key.replace('__', '.')}={value}" for key, value in values.items())
        return kind, flags, changed, gpus

    for parts in (2, 4, 8, 16):
        yield change("accumulate", accumulate=config.accumulate * parts)
    for part in ("vision", "llm", "text"):
        if part in config.model and config.model[part].get("remat", "full") != "full":
            yield change(f"remat {part}", **{f"model__{part}__remat": "full"})
    if config.moment_dtype == "float32":
        yield change("moments", moment_dtype="bfloat16")
    frozen = ("vision/.*", 0.0, 0.0)
    moves = config.model.vision.get("batch_norm") == "train"  # its statistics: then the encoder cannot be frozen
    if not moves and not any(tuple(group) == frozen for group in config.groups):
        rest = [group for group in config.groups if group[0] != "vision/.*"]
        kind, _, changed, _ = change("frozen", groups=(frozen, *map(tuple, rest)))
        yield kind, f'--config.groups="{changed.groups}" (the encoder frozen)', changed, gpus
    for parts in (2, 4, 16, 64):
        if config.data.groups % parts == 0:
            kind, flags, changed, _ = change("groups", data__groups=config.data.groups // parts)
            yield kind, f"{flags} (a smaller batch: another recipe)", changed, gpus
    for count in (2, 4, 8, 16):
        if count > gpus.count and gpus.name.startswith("gpu"):
            more = dataclasses.replace(gpus, name=f"gpu:{count}x{gpus.bytes / GB:g}GB", count=count)
            kind, flags, changed, _ = change("gpus", mesh=(1, 1, -1, 1))
            yield kind, f'--topology={more.name} --config.mesh="(1, 1, -1, 1)"', changed, more


def text(report: dict[str, Any]) -> str:
    """Formats the report for a terminal."""
    m, b, counts = report["memory"], report["batch"], report["parameters"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    sizes = ", ".join(f"{key} {value}" for key, value in b.items() if key != "accumulate" or value > 1)
    shown = (*PARTS, "total", "with_margin", "limit")
    cpu = report["topology"]["name"].startswith("cpu")
    device = "CPU" if cpu else "GPU"
    rows = [[f"GiB a {device}, by arithmetic", *PARTS, "total", f"x {m['margin']}", "limit", ""]]
    rows.append(["", *(gib(m[key]) for key in shown), "fits" if m["fits"] else "DOES NOT FIT"])
    lines = [
        f"{report['stage_name'] or 'train step'} on {report['topology']['name']}, by arithmetic: mesh {mesh}\n{sizes}",
        f"No compiler for {device}s took part and nothing ran: every figure is arithmetic on the traced step.",
        "",
        "parameters: " + ", ".join(f"{name} {si(n)}" for name, n in counts.items()),
        "",
        table(rows, ""),
        f"  x {m['margin']}: compiled steps need up to {m['margin']} times this arithmetic, a large model over many "
        "GPUs more (docs/gpu.md)",
        "  limit: the memory of the machine"
        if cpu
        else f"  limit: the {m['share']:.0%} of the card that JAX takes ({SHARE_VARIABLES[0]}=0.9 takes more); "
        "CUDA's own libraries need about 1 GB beside it",
    ]
    if not m["fits"]:
        mends = report["mends"] or ["none of the settings that were tried"]
        lines += ["", "what would make it fit, by the same arithmetic, each on its own:", *(f"  {x}" for x in mends)]
    return "\n".join(lines)
