"""Reads a Pallas TPU kernel, as the compiled program holds it: its settings, its grid, and the bytes of its blocks."""

import base64
import json
import math
import re
from typing import Any

from jaxlib.mlir import ir

from fastvlm_jax.preflight.hlo.parse import BYTES, Instruction

_TYPES = {f"i{8 * size}": size for size in (1, 2, 4)} | {"i1": 1}  # MLIR's names where HLO has others


def is_kernel(instruction: Instruction) -> bool:
    """Returns whether an instruction runs a Pallas kernel."""
    return instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes


def settings(attributes: str) -> dict[str, Any]:
    """Returns a kernel's settings for the compiler, with its module as "body" inside, from the attributes of the call.

    Raises:
      ValueError: the attributes have none that can be read.
    """
    _, found, text = attributes.rpartition(", backend_config=")
    return json.JSONDecoder().raw_decode(text if found else "")[0]


def module_text(attributes: str) -> str | None:
    """Returns a kernel's module without places in source code; None if there is none that can be read."""
    body = re.search(r'"body":"([^"]+)"', attributes)
    if body is None:
        return None
    try:
        return _text(base64.b64decode(body[1]))
    except ir.MLIRError:  # of another version of Mosaic
        return None


def block_bytes(attributes: str, on_chip: set[int]) -> float | None:
    """Returns the bytes that a kernel moves between HBM and its blocks; None if the text has no module with a grid
    that can be read.

    A block is moved whenever an axis of the grid that its place depends on takes a step, and all axes inside that axis
    start anew. What a kernel moves itself, from operands that have no blocks, is not counted.

    Args:
      attributes: those of the custom call.
      on_chip: which of its arrays, operands first and then results, the compiler holds in on-chip memory.
    """
    module = module_text(attributes)
    return None if module is None else _bytes(module, on_chip)


def _text(module: bytes) -> str:
    from jax._src.lib import tpu  # no public function registers Mosaic's dialect

    with ir.Context() as context:
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(module))


def _bytes(module: str, on_chip: set[int]) -> float | None:
    grid = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", module)
    windows = re.search(r"window_params = \[(.*?)\]\} : ", module)
    if not grid or not windows:
        return None  # without a grid every array is one block
    bounds = [int(size) for size in grid[1].split(",")]
    scalars = int(re.search(r"scalar_prefetch = (\d+)", module)[1])
    blocks = re.findall(r"%arg\d+: memref<([^,>]*)", module[: module.index("):")])[scalars:]
    total = 0.0
    for i, window in enumerate(re.findall(r"\{[^}]*\}", windows[1])):
        place = re.search(r"transform_indices = @(\w+)", window)
        if place and scalars + i not in on_chip:
            total += _size(blocks[i]) * _fetches(_function(module, place[1]), bounds)
    return total


def _function(module: str, name: str) -> str:
    """Returns the body of a function; its name stands behind it."""
    before = module[: module.index(f'sym_name = "{name}"')]
    return before[before.rindex("^bb0(") :]


def _fetches(place: str, bounds: list[int]) -> int:
    """Returns how often the place of a block changes, as if it were another at each step of the axes it depends on."""
    body = place.partition("):")[2]
    used = [axis for axis, size in enumerate(bounds) if size > 1 and re.search(rf"%arg{axis}\b", body)]
    return math.prod(bounds[: used[-1] + 1]) if used else 1


def _size(block: str) -> float:
    """Returns the bytes of a block such as 64x128xbf16."""
    *sizes, kind = block.split("x")
    return math.prod(map(int, sizes)) * _TYPES.get(kind, BYTES.get(kind, 1))
