"""Adds up the cost of a compiled program, loops times their trips: cycles, FLOPs, HBM bytes and collectives."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from fastvlm_jax.preflight.hlo import flops, mosaic
from fastvlm_jax.preflight.hlo.parse import Computation, Instruction, Module, arrays, num_bytes, trips
from fastvlm_jax.preflight.hlo.schedule import Schedule

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operation:
    """Holds the cost of one instruction of the schedule.

    Attributes:
      path: its op_name, or the op_name of the loop around it.
      opcode: its HLO opcode.
      cycles: the compiler's estimate for one trip; None if there is none.
      trips: how often it runs.
      flops: FLOPs of one trip, in matrix products and convolutions.
      traffic: bytes of one trip to and from HBM; of a kernel, those of its blocks or, if that is more, as it declares.
      loop: name of the computation that it stands in.
      kernel: name of a Pallas kernel, "" for other instructions.
      kernel_flops: FLOPs of one trip, as the kernel declares them; for splash attention they are counted here.
      schedule: counts of its final schedule; None if the compiler wrote none.
    """

    path: str
    opcode: str
    cycles: int | None
    trips: int
    flops: float
    traffic: float
    loop: str
    kernel: str = ""
    kernel_flops: float = 0.0
    schedule: Schedule | None = None


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describes a transfer between devices.

    Attributes:
      kind: one of KINDS; "all-reduce" or "send" between slices.
      payload: bytes of the whole transfer, one trip: an all-gather's output, a reduction's input, what a permute sends.
      trips: how often it runs.
      group: positions in the mesh of the devices that exchange it; () for a transfer between slices.
      asynchronous: whether the schedule lets other work run at the same time.
      path: its op_name, or the op_name of the loop around it.
      loop: name of the computation that it runs in.
    """

    kind: str
    payload: float
    trips: int
    group: tuple[int, ...]
    asynchronous: bool
    path: str
    loop: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds the operations and transfers of a program.

    Attributes:
      operations: instructions, with their trips.
      collectives: transfers between devices, with their trips.
      unknown: loops whose trips depend on the data: the body of each, counted once, as a program of its own.
    """

    operations: Sequence[Operation]
    collectives: Sequence[Collective]
    unknown: Sequence["Program"]


def analyse(module: Module, num_devices: int, schedules: Mapping[str, Schedule] = {}) -> Program:
    """Walks the program from the entry computation and collects operations and transfers.

    Args:
      num_devices: devices that run the program.
      schedules: counts of final schedules, by the name of the instruction.
    """
    operations, collectives, unknown = [], [], []

    def visit(computation: Computation, times: int, path: str, into) -> None:
        channels = set()
        for instruction in computation.instructions:
            here = instruction.op_name or path
            if instruction.opcode == "while":
                loop_trips = trips(module, computation, instruction)
                body = module.computations[instruction.attribute("body")]
                if loop_trips is None:
                    inner = ([], [], [])
                    visit(body, 1, here, inner)
                    into[2].append(Program(*inner))
                else:
                    visit(body, times * loop_trips, here, into)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else [
                    instruction.attribute(key) for key in ("true_computation", "false_computation")
                ]  # fmt: skip
                for name in names:
                    visit(module.computations[name], times, here, into)
            elif instruction.opcode == "call" and (called := module.called(instruction)):
                visit(called, times, here, into)
            else:
                schedule = schedules.get(instruction.name)
                into[0].append(_operation(module, computation, instruction, times, here, schedule))
                into[1].extend(_collectives(module, computation, instruction, times, here, num_devices, channels))

    visit(module.computations[module.entry], 1, "", (operations, collectives, unknown))
    return Program(operations, collectives, unknown)


def _operation(
    module, computation: Computation, instruction: Instruction, times: int, path: str, schedule
) -> Operation:
    kernel, declared = "", {}
    traffic = flops.traffic(module, computation, instruction)
    if mosaic.is_kernel(instruction):
        kernel = re.sub(r"(\.(\d+|clone|remat\d*))+$", "", instruction.name)
        declared = dict(re.findall(r'"(flops|bytes_accessed)":"(\d+)"', instruction.attributes))
        if "flops" not in declared and kernel.startswith("splash_mha"):
            declared["flops"] = _attention_flops(computation, instruction)
        traffic = max(float(declared.get("bytes_accessed", 0)), _block_bytes(computation, instruction, traffic))
    return Operation(
        path, instruction.opcode, instruction.cycles, times, flops.instruction_flops(module, computation, instruction),
        traffic, computation.name, kernel, float(declared.get("flops", 0)), schedule,
    )  # fmt: skip


def _block_bytes(computation: Computation, kernel: Instruction, operands: float) -> float:
    """Returns the bytes of a kernel's blocks, or those of its operands and results if the text does not tell."""
    shapes = [computation.by_name[name].shape for name in kernel.operands]
    layouts = [layout for shape in (*shapes, kernel.shape) for _, _, layout in arrays(shape)]
    found = mosaic.block_bytes(kernel.attributes, {i for i, layout in enumerate(layouts) if "S(" in layout})
    return operands if found is None else found


def _attention_flops(computation: Computation, kernel: Instruction) -> float:
    """Returns the FLOPs of a splash attention kernel, which declares none: its products over the full T x S square."""
    # The first two float operands are queries [..., H, T, E] and keys [..., K, S, E]; a batch of one has no axis.
    found = [array for name in kernel.operands for array in arrays(computation.by_name[name].shape)]
    queries, keys = [sizes for kind, sizes, _ in found if kind in ("f32", "bf16") and len(sizes) > 2][:2]
    products = 4 if "dkv" in kernel.name else 3 if "dq" in kernel.name else 2
    return 2.0 * products * math.prod(queries) * keys[-2]


def _collectives(module, computation, instruction, times, path, num_devices, channels: set[str]) -> list[Collective]:
    """Returns the transfers that an instruction starts. A fused one is in its start, steps and end, and counts once."""
    if instruction.opcode == "send" and "is_host_transfer=true" in instruction.attributes:
        reduces = "_xla_megascale_reduce_operation" in instruction.attributes
        payload = num_bytes(instruction.shape.partition("}, u32")[0])
        return [Collective("all-reduce" if reduces else "send", payload, times, (), True, path, computation.name)]
    starts, found = False, []
    holders = [(computation, instruction)]
    if instruction.opcode in ("fusion", "async-start") and (fused := module.called(instruction)):
        holders = _inside(module, fused)
        starts = instruction.opcode == "async-start" or any("AsyncCollectiveStart" in i.attributes for _, i in holders)
    for holder, inner in holders:
        kind = inner.opcode.removesuffix("-start")
        if kind not in KINDS or (inner.channel and inner.channel in channels):
            continue
        channels.add(inner.channel)
        group = _group(inner.attributes, num_devices)
        if "all-reduce-scatter" in holder.name:
            kind = "reduce-scatter"
            payload = num_bytes(inner.shape)
        else:
            payload = _payload(kind, inner, len(group))
        started = starts or inner.opcode.endswith("-start")
        found.append(Collective(kind, payload, times, group, started, inner.op_name or path, computation.name))
    return found


def _inside(module: Module, computation: Computation) -> list[tuple[Computation, Instruction]]:
    """Returns the instructions of a computation and of its fusions, each with the computation that holds it."""
    found = []
    for instruction in computation.instructions:
        found.append((computation, instruction))
        if instruction.opcode == "fusion" and (fused := module.called(instruction)):
            found += _inside(module, fused)
    return found


def _payload(kind: str, instruction: Instruction, size: int) -> float:
    whole = num_bytes(instruction.shape)
    if kind == "reduce-scatter":
        return whole * size
    if instruction.opcode == "all-gather-start":  # (inputs, outputs)
        return whole * size / (size + 1)
    if instruction.opcode == "collective-permute-start":  # (input, output, two counters)
        return (whole - 8) / 2
    return whole


def _group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Returns the first group of devices that exchange something, from any of the four notations of the compiler."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = _ordered(mesh[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        return tuple(ids[tuple(_places(axis, size, mesh[3]) for axis, size in sizes.items())].ravel().tolist())
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, groups[1].split(",")))
    if iota := re.search(r"replica_groups=\[(\d+)[\d,]*\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return tuple(_ordered(iota[2]).reshape(int(iota[1]), -1)[0].tolist())
    if groups := re.search(r"replica_groups=(?!\{\})\S*", attributes):
        raise ValueError(f"preflight cannot read {groups[0]} of the compiled program")
    return tuple(range(num_devices))


def _ordered(text: str) -> np.ndarray:
    """Returns device numbers from "[2,4]" or "[2,4]T(1,0)": 0, 1, ... in that shape, transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(size) for size in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _places(axis: str, size: int, used: str) -> slice:
    """Returns the places of the first group along an axis: one, all, or a part if written as 'axis':(before)part."""
    part = re.search(rf"'{re.escape(axis)}'(?::\((\d+)\)(\d+))?", used)
    if part is None:
        return slice(0, 1)
    if part[1] is None:
        return slice(None)
    stride = size // (int(part[1]) * int(part[2]))
    return slice(0, stride * int(part[2]), stride)


def axes_of(group: Sequence[int], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ; () if the numbers are not those of the mesh."""
    sizes = tuple(mesh_shape.values())
    if not group or max(group) >= math.prod(sizes):
        return ()
    places = np.array(np.unravel_index(np.asarray(group), sizes))
    return tuple(name for name, place in zip(mesh_shape, places, strict=True) if np.any(place != place[0]))
