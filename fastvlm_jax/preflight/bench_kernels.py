"""Compares the encoder's TPU kernels with XLA's plain forms: `fastvlm bench kernels --topology v5e:1x1`.

Both forms of a function are compiled, each alone, for one device; nothing runs on a TPU. There are two cost models:

    estimate    the compiler's `estimated_cycles`, which XLA's operations have and kernels do not
    bundles     those of the final schedule, raised to the time of matrix units and HBM: kernels.py; all operations have

The compiler chooses the layouts of arguments and results, so that no copy at the border of a program counts: in a tower
the neighbours agree on layouts, as far as they can.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from fastvlm_jax import files, sharding
from fastvlm_jax.bench.page import markdown_table
from fastvlm_jax.kernels.batch_norm import moments, normalisation, weighted_sum
from fastvlm_jax.kernels.depthwise import depthwise_conv
from fastvlm_jax.kernels.depthwise_tpu import LANES, SUBLANES
from fastvlm_jax.kernels.mlp import mlp
from fastvlm_jax.preflight import estimate, kernels, topology
from fastvlm_jax.preflight.compile import cache_folder, compile_with_text
from fastvlm_jax.preflight.hlo import cost, mosaic, schedule
from fastvlm_jax.preflight.hlo.parse import parse
from fastvlm_jax.preflight.hlo.schedule import Schedule
from fastvlm_jax.preflight.topology import Slice

_VERSION = 1  # version of the cached results
_SLOTS = 4  # vector instructions of a bundle: a multiply-add is two of them
_BODY = re.compile(r"body\\22: \\22([\w+/=]+)")  # of a kernel, in a lowered program
_SCHEDULE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")


class Case(NamedTuple):
    """Names a function of the encoder on one of its maps.

    Attributes:
      kernel: "depthwise"; "pointwise": fc1, GELU, fc2 and the residual, with 4 C hidden values; or "batch_norm":
        BatchNorm with statistics of all images.
      size: the depthwise kernel's rows and columns; 1 for the others.
      map: rows, columns and channels.
      stride: of the depthwise kernel, which with stride 2 has two outputs a channel.
    """

    kernel: str
    size: int
    map: tuple[int, int, int]
    stride: int = 1

    @property
    def name(self) -> str:
        if self.kernel != "depthwise":
            return {"pointwise": "pointwise block", "batch_norm": "BatchNorm"}[self.kernel]
        return f"depthwise {self.size}x{self.size}" + f", stride {self.stride}" * (self.stride > 1)


# The maps of stages 0 to 4 of FastViTHD at 1024 px. Every function with TPU kernels has its rows here.
STAGES = [(256, 256, 96), (128, 128, 192), (64, 64, 384), (32, 32, 768), (16, 16, 1536)]
CASES = [
    *[Case("depthwise", 7, each) for each in STAGES],
    *[Case("depthwise", 3, each) for each in STAGES[:3]],
    *[Case("depthwise", 7, each, 2) for each in STAGES[:4]],
    *[Case("pointwise", 1, each) for each in STAGES[:3]],
    *[Case("batch_norm", 1, each) for each in STAGES[:3]],
]
PASSES = ("forward", "backward")


def measure(name: str, rows: int, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Returns a row for each case and pass, JSON-ready; all times are estimates, in cycles for all images.

    Must be the first use of the TPU compiler in a process: it reads the flags that ask for schedules when it is loaded.

    Args:
      name: topology, of which one device is used.
      rows: images at a time.
      cases: functions to compare.

    Raises:
      ValueError: the topology does not exist, or the TPU compiler is missing or was in use before.
    """
    slices, own_flags, found = topology.parse(name), os.environ.get("LIBTPU_INIT_ARGS", ""), []
    with tempfile.TemporaryDirectory(prefix="fastvlm_schedules_") as folder, _asking_for_schedules(folder):
        mesh = sharding.make_mesh((1, 1, 1, 1), topology.devices(slices)[:1])
        for case in cases:
            for direction in PASSES:
                forms = [
                    _compiled(case, rows, direction, form, mesh, slices, pathlib.Path(folder), own_flags)
                    for form in ("none", "auto")
                ]
                found.append(_row(case, rows, direction, forms, mesh, slices))
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return {"topology": name, "images": rows, "versions": versions, "rows": found}


@contextlib.contextmanager
def _asking_for_schedules(folder: str):
    """Adds the compiler's flags to write the last schedule of each operation to the environment of the block."""
    before = os.environ.get("LIBTPU_INIT_ARGS")
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_to_filter=pass=^final_bundles$"
    os.environ["LIBTPU_INIT_ARGS"] = f"{before or ''} {dump}".strip()
    try:
        yield
    finally:
        os.environ.pop("LIBTPU_INIT_ARGS")
        if before is not None:
            os.environ["LIBTPU_INIT_ARGS"] = before


def program(case: Case, rows: int, direction: str, form: str):
    """Returns a function and the shapes of its arguments: a case forward, or the gradients of its input and weights.

    Args:
      form: `kernels` of the function: "none" for XLA's form, "auto" for the TPU kernels.
    """
    H, W, C = case.map
    x = jax.ShapeDtypeStruct((rows, H, W, C), jnp.bfloat16)
    if case.kernel == "depthwise":
        shapes = [((case.size, case.size, 1, C * case.stride), jnp.float32)]
        function = partial(depthwise_conv, stride=case.stride, kernels=form)
    elif case.kernel == "batch_norm":
        shapes = [((C,), jnp.float32)] * 2

        def function(x, weight, bias):
            found = normalisation(moments(x, form), weight, bias, None, rows, H * W)
            return weighted_sum((x,), (found.factor,), found.shift, form)
    else:
        shapes = [((C, 4 * C), x.dtype), ((4 * C,), x.dtype), ((4 * C, C), x.dtype), ((C,), x.dtype)]

        def function(x, *weights):
            return mlp(x, *weights[:4], *weights[4:], kernels=form)

    args = [x, *(jax.ShapeDtypeStruct(*shape) for shape in shapes)]
    residual = [x] if case.kernel == "pointwise" else []  # its gradient is that of the result

    def forward(*args):
        return function(*args)

    def backward(dy, *args):
        return jax.vjp(function, *args)[1](dy)

    if direction == "backward":
        return backward, [jax.eval_shape(function, *args), *args]
    return forward, [*args, *residual]


def floor(case: Case, rows: int, direction: str, slices: Slice, cores: int) -> dict[str, float]:
    """Returns the least cycles of each resource, which no form can do without.

    "vector units" counts the multiply-adds of a depthwise convolution in float32, with channels in whole vectors; once
    forward, twice backward. "matrix units" counts the products at the peak rate: two forward, five backward, where the
    hidden values are computed again. "HBM" moves each map once: input and result, or input and two gradients; forward
    also the residual. BatchNorm reads all of its maps twice, because their sums come first.

    Args:
      cores: cores of a device.
    """
    (H, W, C), backward = case.map, direction == "backward"
    clock, positions = slices.generation.clock, rows * H * W
    result = 1 / case.stride  # in sizes of x: a fourth of the positions, twice the channels
    maps = 1 + result + (backward or case.kernel == "pointwise")
    if case.kernel == "batch_norm":
        maps = 5 if backward else 3
    least = {"HBM": maps * positions * C * 2 / slices.device_bandwidth * clock}
    if case.kernel == "batch_norm":
        return least
    if case.kernel == "depthwise":
        vectors = positions * math.ceil(C / LANES) / SUBLANES * result
        multiply_adds = vectors * case.size**2 * (2 if backward else 1)
        return {"vector units": multiply_adds * 2 / _SLOTS / cores, **least}
    flops = 2 * positions * C * 4 * C * (5 if backward else 2)
    return {"matrix units": flops / slices.device_flops * clock, **least}


def _compiled(case, rows, direction, form, mesh, slices: Slice, folder: pathlib.Path, own_flags: str) -> dict[str, Any]:
    """Compiles a form, or reads it from the cache: {"text": the program, "schedules": counts of each operation}."""
    function, shapes = program(case, rows, direction, form)
    here = Format(Layout.AUTO, sharding.NamedSharding(mesh, sharding.P()))
    with topology.compiler(), jax.set_mesh(mesh):
        lowered = jax.jit(function, in_shardings=here, out_shardings=here).lower(*shapes)
        about = [_VERSION, importlib.metadata.version("libtpu"), own_flags, slices.generation.prefix]
        file = cache_folder() / "forms" / f"{files.json_digest([*about, without_places(lowered.as_text())])[:24]}.json"
        if file.is_file():
            return files.read_object(file)
        shape = "x".join(map(str, (rows, *case.map)))
        print(f"compiling {case.name} {direction} of {shape}, kernels: {form}", file=sys.stderr, flush=True)
        for old in folder.glob("*"):
            old.unlink()
        _, text = compile_with_text(lowered)
    written = {match[1]: path for path in folder.glob("*") if (match := _SCHEDULE.fullmatch(path.name))}
    if not written:
        raise ValueError("the TPU compiler wrote no schedules, because this process used it before: start another")
    names = {name for name in written if re.search(rf"%{re.escape(name)} = ", text)}
    found = {"text": text, "schedules": {name: schedule.count(written[name].read_text()) for name in sorted(names)}}
    files.write_json(file, found)
    return json.loads(json.dumps(found))


def without_places(text: str) -> str:
    """Returns a lowered program without the places in source code that its kernels hold."""
    return _BODY.sub(lambda found: mosaic.module_text(f'"body":"{found[1]}"') or found[0], text)


def _row(case: Case, rows: int, direction: str, forms: Sequence[dict[str, Any]], mesh, slices: Slice) -> dict[str, Any]:
    """Returns the figures of a case and pass, from XLA's form and the one with kernels."""
    plain, own = (
        cost.analyse(parse(form["text"]), 1, {name: Schedule(*each) for name, each in form["schedules"].items()})
        for form in forms
    )
    with jax.set_mesh(mesh):
        least = floor(case, rows, direction, slices, sharding.device_cores())
    bounds = [kernels.cycles(operation, slices)[1] for operation in own.operations if operation.kernel]
    return {
        "kernel": case.name,
        "map": [rows, *case.map],
        "pass": direction,
        "xla_estimate": sum(estimate.cycles_of(operation, slices) for operation in plain.operations),
        "xla_bundles": scheduled(plain, slices),
        "cycles": scheduled(own, slices),
        "bound": bounds[0] if bounds else "no kernel",
        "floor": max(least.values()),
        "floor_bound": max(least, key=least.get),
    }


def scheduled(found: cost.Program, slices: Slice) -> float:
    """Returns the cycles of a program by its schedules; those of an operation without one by the estimate.

    They are no fewer than HBM needs for all bytes, those too that are fetched beside the computation.
    """
    cycles = sum(
        kernels.cycles(operation, slices)[0] * operation.trips
        if operation.schedule
        else estimate.cycles_of(operation, slices)
        for operation in found.operations
    )
    traffic = sum(operation.traffic * operation.trips for operation in found.operations)
    return max(cycles, traffic / slices.device_bandwidth * slices.generation.clock)


def text(found: dict[str, Any]) -> str:
    """Returns the rows as a table in markdown, M cycles, under a line that says what they are."""
    header = [
        "kernel", "map", "pass", "XLA, estimate", "XLA, bundles", "kernel", "bound by", "floor", "floor of",
        "XLA / kernel, estimate", "bundles", "kernel / floor",
    ]  # fmt: skip
    rows = []
    for row in found["rows"]:
        ours = row["cycles"]
        rows.append(
            [row["kernel"], "x".join(map(str, row["map"])), row["pass"]]
            + [f"{row[name] / 1e6:.2f}" for name in ("xla_estimate", "xla_bundles", "cycles")]
            + [row["bound"], f"{row['floor'] / 1e6:.2f}", row["floor_bound"]]
            + [f"{ratio:.2f}" for ratio in (row["xla_estimate"] / ours, row["xla_bundles"] / ours, ours / row["floor"])]
        )
    about = (
        f"M cycles of one device of {found['topology']} for {found['images']} images, ESTIMATED by the TPU compiler "
        f"(libtpu {found['versions']['libtpu']}); nothing ran on a TPU."
    )
    return f"{about}\n\n{markdown_table(header, rows)}"
