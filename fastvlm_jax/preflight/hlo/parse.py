"""Parses the text of a compiled program: computations, instructions, shapes, loops and their trip counts."""

import dataclasses
import functools
import math
import re

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "s4": 0.5,
    "u4": 0.5,
}  # fmt: skip; other types (float8) count as 1 byte per element, tokens as 0
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds one line of the text.

    Attributes:
      operands: names of instructions in the same computation.
      attributes: the text behind the operands.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Returns the value of `name=value`, up to the next comma and without a leading %; "" if there is none."""
        found = re.search(rf"[, ]{name}=%?([^,\s]+)", self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def op_name(self) -> str:
        """Returns its place in the model, as jit(train_step)/jvp(FastVLM)/llm/...; "" if the compiler has lost it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def cycles(self) -> int | None:
        """Returns the compiler's estimate of its cycles, None if there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @functools.cached_property
    def channel(self) -> str:
        return self.attribute("channel_id")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Holds a named sequence of instructions, such as a loop body or what a fusion contains."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """Holds a compiled program. Its instructions run in the order of the text."""

    computations: dict[str, Computation]
    entry: str

    def called(self, instruction: Instruction) -> Computation | None:
        """Returns the computation inside a fusion, a call or an asynchronous wrapper; None for other instructions."""
        name = instruction.attribute("calls") or instruction.attribute("to_apply")
        return self.computations.get(name)


def parse(text: str) -> Module:
    """Parses the HLO text of a compiled program, as the compiler dumps it or `compiled.as_text()` returns it.

    Raises:
      ValueError: the text has no entry computation, or a line that this parser does not know.
    """
    computations, current, lines, entry = {}, None, [], None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line) if line[:1] not in ("", " ") else None
            if header:
                current, lines = header[2], []
                entry = current if header[1] else entry
        elif line.rstrip() == "}":
            computations[current] = Computation(current, tuple(_instruction(line) for line in lines))
            current = None
        elif line.startswith(("  %", "  ROOT ")):
            lines.append(line)
        elif lines:  # metadata of a kernel goes on over several lines
            lines[-1] += line
    if entry is None:
        raise ValueError("the compiled program has no entry computation: preflight may not know this version of libtpu")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    found = _LINE.match(line)
    if found is None:
        raise ValueError(f"preflight cannot read this line of the compiled program: {line[:120]}")
    operands, _, attributes = found[4].partition(")")
    names = tuple(re.findall(r"%([\w.\-]+)", operands)) if "%" in operands else ()
    literal = f"{operands})" if found[3] in ("constant", "parameter") else ""
    return Instruction(found[1], found[2], found[3], names, literal + attributes, line.startswith("  ROOT "))


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns (type, sizes, layout) of each array in a shape or in a tuple of shapes."""
    return [
        (kind, tuple(map(int, sizes.split(","))) if sizes else (), layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]


def num_bytes(shape: str, hbm_only: bool = False) -> float:
    """Returns the bytes of a shape, without padding.

    Args:
      hbm_only: leaves out the arrays that the compiler put in on-chip memory, S(1) and up.
    """
    return sum(
        BYTES.get(kind, 0 if kind == "token" else 1) * math.prod(sizes)
        for kind, sizes, layout in arrays(shape)
        if not (hbm_only and "S(" in layout)
    )


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a while loop in a computation runs, None if that depends on the data.

    A loop of `lax.scan` counts by 1 up to the one constant in its condition. It starts from 0, or from 1 if the
    compiler has moved the first iteration in front of the loop.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")]
    inside = list(condition.instructions)
    for instruction in condition.instructions:
        if instruction.opcode == "fusion" and (fused := module.called(instruction)):
            inside += fused.instructions
    compares = [i for i in inside if i.opcode == "compare"]
    limits = [int(n) for i in inside if i.opcode == "constant" for n in re.findall(r"^(\d+)\)", i.attributes)]
    counts = {"compare", "constant", "get-tuple-element", "parameter", "fusion", "bitcast", "copy"}
    alone = len(compares) == len(limits) == 1 and {i.opcode for i in inside} <= counts
    if alone and "direction=LT" in compares[0].attributes:
        return limits[0] - _start_value(computation, loop, condition)
    return None


def _start_value(computation: Computation, loop: Instruction, condition: Computation) -> int:
    """Returns the start value of a loop's counter: the constant at its place in the loop's tuple, else 0."""
    counters = [i for i in condition.instructions if i.opcode == "get-tuple-element" and i.shape.startswith("s32[]")]
    state = computation.by_name.get(loop.operands[0])
    if len(counters) != 1 or state is None or state.opcode != "tuple":
        return 0
    return _constant(computation, state.operands[int(counters[0].attribute("index"))])


def _constant(computation: Computation, name: str) -> int:
    found = computation.by_name.get(name)
    if found is not None and found.opcode in ("copy", "bitcast"):
        return _constant(computation, found.operands[0])
    if found is not None and found.opcode == "add":
        return sum(_constant(computation, operand) for operand in found.operands)
    value = re.match(r"(\d+)\)", found.attributes) if found is not None and found.opcode == "constant" else None
    return int(value[1]) if value else 0
