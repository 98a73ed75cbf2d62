"""Finds by arithmetic how many bytes a traced program holds at its fullest moment; no compiler takes part.

The operations run in the order of the trace. A value takes memory from the operation that makes it to its last use:

    operation           held during it
    h = x @ w           x w h
    a = gelu(h)         x h             fused: element-wise results that no product reads take no memory, and their
    y = a + x           x h y           operands live until the reader has run
    z = exp(y)          z               a result may take the place of an operand that ends there

Compilers also reorder, recompute, duplicate and pad, so the result is an estimate; docs/gpu.md
holds it against compiled programs.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Element-wise operations and changes of layout, which compilers fuse into the operations that read them.
FUSED = {
    "abs", "add", "and", "atan2", "broadcast_in_dim", "cbrt", "ceil", "clamp", "concatenate",
    "convert_element_type", "copy", "cos", "div", "empty2", "eq", "erf", "erf_inv", "exp", "exp2", "expand_dims",
    "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "name", "ne", "neg", "not", "optimization_barrier", "or", "pad", "pow", "reduce_precision", "rem",
    "reshape", "reshard", "rev", "round", "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "slice",
    "split", "sqrt", "square", "squeeze", "stack", "stop_gradient", "sub", "tan", "tanh", "tile", "transpose",
    "unstack", "xor",
}  # fmt: skip
REDUCTIONS = {"argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"}
# These write their result beside their operands; other operations may write it in the place of one that ends.
APART = REDUCTIONS | {"dot_general", "conv_general_dilated", "gather", "pallas_call", "transpose"}
# Calls whose body is taken in their place.
CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2", "shard_map"}
PHASES = ("forward", "backward", "optimizer")


class Peak(NamedTuple):
    """Holds the fullest moment of a program.

    Attributes:
      bytes: bytes held then.
      kinds: the same bytes by what they are: the labels of the arguments, "activations" (made by the forward pass, read
        by the backward pass), "gradients" (made by the backward pass, read by the optimizer) and "workspace".
    """

    bytes: int
    kinds: collections.Counter


class _Operation(NamedTuple):
    name: str
    inputs: list[int]  # numbers of values
    outputs: list[int]
    phase: int  # number of one of PHASES
    loop: tuple[Any, list[str], int] | None  # of a loop: its body, labels of the body's arguments, phase of its begin


class _Trace:
    """Holds a program taken apart: operations on numbered values, with calls and choices replaced by their bodies."""

    def __init__(self, jaxpr, kernels: bool, phase: int):
        self.kernels, self.phase, self.operations, self.sizes = kernels, phase, [], []
        self.arguments = [self.value(v) for v in jaxpr.invars]
        self.results = self.read(jaxpr, dict(zip(jaxpr.invars, self.arguments, strict=True)))

    def value(self, var) -> int:
        self.sizes.append(num_bytes(var.aval))
        return len(self.sizes) - 1

    def read(self, jaxpr, numbers: dict) -> list[int]:
        """Appends the operations of a jaxpr whose arguments have `numbers`; returns the numbers of its results."""

        def number(var) -> int:
            if isinstance(var, core.Literal):
                return self.value(var)
            return numbers[var] if var in numbers else numbers.setdefault(var, self.value(var))  # a constant

        for eqn in jaxpr.eqns:
            inputs, body = [number(v) for v in eqn.invars], self.body(eqn)
            self.phase, loop = max(self.phase, _phase(eqn)), _loop(eqn, self.phase)
            if loop:
                self.phase = max(self.phase, *map(_phase, loop[0].eqns))
            if body is None:
                outputs = [self.value(v) for v in eqn.outvars]
                self.operations.append(_Operation(eqn.primitive.name, inputs, outputs, self.phase, loop))
            else:
                given = inputs[len(inputs) - len(body.invars) :]  # a choice has its index before
                outputs = self.read(body, dict(zip(body.invars, given, strict=True)))
            numbers.update(zip(eqn.outvars, outputs, strict=True))
        return [number(v) for v in jaxpr.outvars]

    def body(self, eqn):
        """Returns the jaxpr that takes the place of a call, or of a choice between forms; None for the others."""
        if eqn.primitive.name in CALLS:
            return _open(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
        if eqn.primitive.name != "cond":
            return None
        choose = min if self.kernels else max
        branches = map(_open, eqn.params["branches"])
        return choose(branches, key=lambda b: peak(b, ["argument"] * len(b.invars), kernels=self.kernels).bytes)


def peak(jaxpr, labels: Sequence[str], *, kernels: bool, kept: Sequence[str] = (), phase: int = 0) -> Peak:
    """Returns the fullest moment of a jaxpr.

    Args:
      jaxpr: the program, a Jaxpr.
      labels: what each argument is; "" for one that is counted elsewhere.
      kernels: of forms for several platforms, whether the leanest runs (a GPU's kernels, which store no attention
        scores) or the one that needs most.
      kept: labels of the arguments that are held to the end; the others are given up at their last use.
      phase: number of the one of PHASES that the program begins in.
    """
    trace = _Trace(jaxpr, kernels, phase)
    operations, sizes = trace.operations, trace.sizes
    for value, label in zip(trace.arguments, labels, strict=True):
        sizes[value] *= bool(label)
    last, fused = _last_uses(trace)
    last |= {v: len(operations) for v, label in zip(trace.arguments, labels, strict=True) if label in kept}
    made = dict.fromkeys(trace.arguments, -1)
    ends = collections.defaultdict(list)
    held = sum(sizes[v] for v in trace.arguments)
    most, when, beside, placed = held, -1, collections.Counter(), 0
    for i, operation in enumerate(operations):
        made.update(dict.fromkeys(operation.outputs, i) if not fused[i] else {})
    for value in made:
        ends[last.get(value, made[value])].append(value)
    for i, operation in enumerate(operations):
        if not fused[i]:
            born, free = sum(sizes[v] for v in operation.outputs), {*ends[i]} - {*operation.outputs}
            reused = 0 if operation.name in APART else min(born, sum(sizes[v] for v in free))
            inside = _inside(operation, kernels)
            held += born - reused
            if held + inside.total() > most:
                most, when, beside, placed = held + inside.total(), i, inside, reused
            held += reused
        held -= sum(sizes[v] for v in ends[i])
    kinds, named = collections.Counter(beside), dict(zip(trace.arguments, labels, strict=True))
    for value, at in made.items():
        if at <= when <= last.get(value, at):
            kinds[named.get(value) or _kind(operations, at, last.get(value, at))] += sizes[value]
    kinds["workspace"] -= placed  # counted as the operand and as the result, one of which is workspace
    return Peak(most, +kinds)


def _last_uses(trace: _Trace) -> tuple[dict[int, int], list[bool]]:
    """Returns value -> number of the operation that reads it last, and whether each operation is fused."""
    operations, end = trace.operations, len(trace.operations)
    stored = {v for o in operations if o.name not in FUSED | REDUCTIONS for v in o.inputs} | {*trace.results}
    fused = [o.name in FUSED and not stored & {*o.outputs} for o in operations]
    last = dict.fromkeys(trace.results, end)
    for i in range(end - 1, -1, -1):
        read = max(last.get(v, i) for v in operations[i].outputs) if fused[i] else i
        for value in operations[i].inputs:
            last[value] = max(last.get(value, -1), read)
    return last, fused


def _kind(operations: list[_Operation], made: int, last: int) -> str:
    maker, reader = operations[made].phase, operations[last].phase if last < len(operations) else 2
    return {(0, 1): "activations", (1, 2): "gradients"}.get((maker, reader), "workspace")


def _inside(operation: _Operation, kernels: bool) -> collections.Counter:
    """Returns what one turn of a loop holds beside the loop's arguments and results, by kind."""
    if operation.loop is None:
        return collections.Counter()
    body, labels, phase = operation.loop
    kinds = peak(body, labels, kernels=kernels, phase=phase).kinds
    kinds["workspace"] += kinds.pop("slice", 0)
    del kinds["carry"]
    return kinds


def _loop(eqn, phase: int) -> tuple[Any, list[str], int] | None:
    """Returns the body of a loop and the labels of its arguments; what stays the same in all turns is held outside."""
    if eqn.primitive.name == "scan":  # by shapes: the names of its parameters depend on JAX's version
        body = _open(eqn.params["jaxpr"])
        carried = sum(map(_same_rank, eqn.outvars, body.outvars))
        same = sum(map(_same_rank, eqn.invars, body.invars)) - carried
    elif eqn.primitive.name == "while":
        body, same = _open(eqn.params["body_jaxpr"]), eqn.params["body_nconsts"]
        carried = len(body.invars) - same
    else:
        return None
    labels = [""] * same + ["carry"] * carried + ["slice"] * (len(body.invars) - same - carried)
    return body, labels, max(phase, _phase(eqn))


def _same_rank(outside, inside) -> bool:
    """Returns whether a value of a scan has the same number of axes in its body: it is no stack of slices."""
    return len(outside.aval.shape) == len(inside.aval.shape)


def _phase(eqn) -> int:
    """Returns the number of an operation's phase by the names that JAX and train_step give it; no name is "forward"."""
    name = str(eqn.source_info.name_stack)
    return 2 if name.startswith("optimizer") else 1 if "transpose(" in name else 0


def _open(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def num_bytes(aval) -> int:
    """Returns the bytes of an array by its shape and dtype; 0 for what is no array, 8 for each random key."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return 0
    return math.prod(aval.shape) * (8 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else dtype.itemsize)
