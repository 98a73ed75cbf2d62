"""Counts the work of an instruction: FLOPs of matrix products and convolutions, and bytes moved to and from HBM."""

import math
import re

from fastvlm_jax.preflight.hlo.parse import BYTES, Computation, Instruction, Module, arrays, num_bytes

NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "iota",
}  # fmt: skip


def flops(module: Module, computation: Computation) -> float:
    """Counts the FLOPs of matrix products and convolutions in a computation and its fusions, without loops inside."""
    total = 0.0
    for instruction in computation.instructions:
        if instruction.opcode in ("convolution", "dot"):
            total += _product(computation, instruction)
        elif instruction.opcode == "fusion" and (fused := module.called(instruction)):
            total += flops(module, fused)
    return total


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Counts the FLOPs of one instruction; for a fusion, of all instructions inside it."""
    if instruction.opcode in ("convolution", "dot"):
        return _product(computation, instruction)
    fused = module.called(instruction) if instruction.opcode == "fusion" else None
    return flops(module, fused) if fused else 0.0


def _product(computation: Computation, product: Instruction) -> float:
    """Returns 2 x multiply-adds, without those on padding or on the holes of a dilated input."""
    left, right = (computation.by_name[name].shape for name in product.operands[:2])
    sizes = arrays(left)[0][1], arrays(right)[0][1], arrays(product.shape)[0][1]
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(sizes[2]) * math.prod(sizes[0][d] for d in dims)
    labels = product.attribute("dim_labels")
    lhs, rest = labels.split("_", 1)
    rhs, out = rest.split("->")
    size = [dict(zip(names, shape, strict=True)) for names, shape in zip((lhs, rhs, out), sizes, strict=True)]
    groups = int(product.attribute("batch_group_count") or 1)
    total = 2.0 * size[2]["f"] * size[1]["i"] * size[0]["b"] / groups
    for dim in (d for d in out if d.isdigit()):
        total *= _valid(size[0][dim], size[1][dim], size[2][dim], _window(product, int(dim)))
    return total


def _window(product: Instruction, dim: int) -> dict[str, tuple[int, ...]]:
    """Returns the window's settings for one spatial dimension, as {"stride": (2,), "pad": (3, 3), ...}."""
    found = re.search(r"window=\{([^}]*)\}", product.attributes)
    settings = dict(item.split("=") for item in found[1].split()) if found else {}
    return {
        key: tuple(map(int, value.split("x")[dim].split("_")))
        for key, value in settings.items()
        if key != "rhs_reversal"
    }


def _valid(input_size: int, kernel: int, output: int, window: dict[str, tuple[int, ...]]) -> int:
    """Counts the pairs of output and kernel position that read an input element, along one dimension."""
    stride, low = window.get("stride", (1,))[0], window.get("pad", (0, 0))[0]
    holes, spread = window.get("lhs_dilate", (1,))[0], window.get("rhs_dilate", (1,))[0]
    last, count = (input_size - 1) * holes, 0
    for k in range(kernel):
        start = k * spread - low  # the input position that output 0 reads for this kernel position
        if holes == 1:
            first = max(0, -(start // stride))
            count += max(0, min(output - 1, (last - start) // stride) - first + 1)
        else:
            count += sum(0 <= start + o * stride <= last and (start + o * stride) % holes == 0 for o in range(output))
    return count


def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Counts the bytes that an instruction reads from and writes to HBM, each operand once.

    If a fusion only slices an operand, or updates it in place, only the slice counts.
    """
    if instruction.opcode == "copy-start":  # (destination, source, counter); one of the first two is on the chip
        return num_bytes(instruction.shape, hbm_only=True)
    if instruction.opcode == "async-start" and instruction.name.startswith("slice-start"):
        # ((source), destination, counter): a slice that is fetched onto the chip while other operations run
        kind, sizes, _ = arrays(instruction.shape)[-2]
        return float(BYTES[kind] * math.prod(sizes))
    if instruction.opcode in NO_TRAFFIC or instruction.opcode.endswith(("-done", "-start")):
        return 0.0
    shapes = [computation.by_name[name].shape for name in instruction.operands if name in computation.by_name]
    if instruction.opcode in ("dynamic-slice", "slice"):
        return 2 * num_bytes(instruction.shape, hbm_only=True)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * num_bytes(shapes[1], hbm_only=True)
    fused = module.called(instruction) if instruction.opcode == "fusion" else None
    if fused is None:
        return sum(num_bytes(shape, hbm_only=True) for shape in (instruction.shape, *shapes))
    parameters = {int(re.match(r"\d+", i.attributes)[0]): i for i in fused.instructions if i.opcode == "parameter"}
    total, updated = 0.0, 0.0
    for i, shape in enumerate(shapes):
        share, in_place = _used(fused, parameters[i].name) if i in parameters else (1.0, 0.0)
        total += share * num_bytes(shape, hbm_only=True)
        updated += in_place * num_bytes(shape, hbm_only=True)
    return total + max(0.0, num_bytes(instruction.shape, hbm_only=True) - updated)


def _used(fused: Computation, parameter: str) -> tuple[float, float]:
    """Returns the fraction of a parameter that a fusion reads or updates, and the fraction that it leaves unchanged."""
    names, whole, part, kept = {parameter}, num_bytes(fused.by_name[parameter].shape), 0.0, 0.0
    for instruction in fused.instructions:
        hits = [n for n in instruction.operands if n in names]
        if not hits or not whole:
            continue
        if instruction.opcode == "bitcast":
            names.add(instruction.name)
        elif instruction.opcode in ("dynamic-slice", "slice") and instruction.operands[0] in names:
            part += num_bytes(instruction.shape) / whole
        elif instruction.opcode == "dynamic-update-slice" and instruction.operands[0] in names:
            update = num_bytes(fused.by_name[instruction.operands[1]].shape) / whole
            part, kept = part + update, kept + 1 - update
        else:
            return 1.0, kept
    return min(part, 1.0), min(kept, 1.0)
