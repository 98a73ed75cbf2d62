"""Counts the bundles of a kernel's final schedule, about one a cycle, loops times their trips.

The TPU compiler writes the schedule of a kernel as text, one bundle of instructions a line (shortened):

       0x4   :  { %s62 = smov.u32 0  ;;  %s9 = smov.u32 0 }
       0x5 LB: > { %s8 = sphi %s9, %s14 /* iteration index, stage = 2 */ }     a loop of depth 1 begins: the grid
      0x35 LB: >> { %s22 = sphi %s62, %s20  ;;  %s20 = sadd.s32 1, %s22 }      a loop of depth 2 begins
      0x36   : >> { %p2 = scmp.ge.s32.totalorder %s20, 37 /* loop exit test */ }
      0x46   : >> { %219 = sbr.rel (!%p2) target = $region109 }
      0x47   :  {}                                                             a delay slot, of the loop before it
      0x54   : > { %s14 = sadd.s32 1, %s8 }
      0x55   : > { %p0 = scmp.ge.s32.totalorder %s14, 26 /* loop exit test */ }
      0x58   : > { %13 = sbr.rel (!%p0) target = $region120 }

The grid's loop, here of 24 steps, has two turns more, which fetch the first block and write back the last; they skip
the kernel's body. A fusion of XLA may have more of them, as many as its last stage says. Other branches are counted as
if they skipped nothing.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

_BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|0) +(\w\w)? *: *(>*) *\{(.*)", re.S)
_TEST = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%p\w+\), )?(%s\w+), (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!(%p\d+)\w*\) target = \$region(\d+)")
_GRID = "iteration index, stage = "  # a comment that no other loop has
_STAGE = re.compile(rf"{_GRID}(\d+)")
_PRODUCT = re.compile(r"= vmatmul\.(\S*)mxu(\d)")
# Rows of a matrix that one instruction holds by the type of its numbers, 32 bits the narrower the more; float32: 8.
_ROWS = {"bf16": 16, "s8": 32, "u8": 32, "f8": 32}


class Schedule(NamedTuple):
    """Holds the counts of one run of a kernel.

    Attributes:
      bundles: instruction bundles that it runs; a stall adds none.
      rows: rows that its busiest matrix unit takes.
      unknown: loops whose trips the text does not tell; they are counted once.
    """

    bundles: int
    rows: int
    unknown: int


@dataclasses.dataclass
class _Loop:
    """Holds a loop: its depth, the regions that start with it, its own bundles, the loops inside, its branch back."""

    depth: int
    regions: set[str]
    bundles: list[str] = dataclasses.field(default_factory=list)
    inner: list["_Loop"] = dataclasses.field(default_factory=list)
    test: str = ""  # the predicate that ends it; "" until the branch back is read


def count(text: str) -> Schedule:
    """Counts the bundles and matrix products of a kernel's final schedule.

    Raises:
      ValueError: the text has no bundle.
    """
    root, text = _loops(text), re.sub(r"_s\d+\b|_p\d+\b", "", text)  # names without the registers that they are put in
    if not (root.bundles or root.inner):
        raise ValueError("the compiler's schedule has no bundles: preflight may not know this version of libtpu")
    tests = {test: (counter, int(limit)) for test, counter, limit in _TEST.findall(text)}
    return _count(root, tests, text)


def _loops(text: str) -> _Loop:
    """Returns the bundles outside all loops, with the loops inside."""
    root = _Loop(0, set())
    open_loops = [root]
    for line in _bundles(text):
        mark, depth, instructions = _BUNDLE.match(line).groups()
        if not instructions.startswith("}"):  # an empty bundle tells no depth, nor do some before a loop's branch back
            while open_loops[-1].test and open_loops[-1].depth > len(depth) - (mark == "LB"):
                open_loops.pop()
        if mark == "LB":
            loop = _Loop(len(depth), set(re.findall(r"Start region (\d+)", instructions)))
            open_loops[-1].inner.append(loop)
            open_loops.append(loop)
        open_loops[-1].bundles.append(instructions)
        for test, region in _BACK.findall(instructions):
            for loop in open_loops:
                loop.test = test if region in loop.regions else loop.test
    return root


def _bundles(text: str) -> Sequence[str]:
    """Returns the text of each bundle; comments make some several lines long."""
    starts = [found.start() for found in re.finditer(r"^ *(?:0x[0-9a-f]+|0) +(?:\w\w)? *:", text, re.M)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=False)]


def _count(loop: _Loop, tests: dict[str, tuple[str, int]], text: str) -> Schedule:
    """Adds up a loop with those inside."""
    own, rows = "".join(loop.bundles), [0, 0, 0, 0]
    for kind, unit in _PRODUCT.findall(own):
        rows[int(unit)] += next((size for name, size in _ROWS.items() if name in kind), 8)
    inner = [_count(part, tests, text) for part in loop.inner]
    trips = 1
    if loop.depth:
        trips = _trips(*tests[loop.test], text) if loop.test in tests else None
        if loop.depth == 1 and trips and _GRID in own:
            trips = max(0, trips - max(2, *map(int, _STAGE.findall(own))))
    times = 1 if trips is None else trips
    return Schedule(
        times * (len(loop.bundles) + sum(part.bundles for part in inner)),
        times * (max(rows) + sum(part.rows for part in inner)),
        (trips is None) + sum(part.unknown for part in inner),
    )


def _trips(counter: str, limit: int, text: str) -> int:
    """Returns how often a loop runs whose counter goes up to a limit."""
    added = re.search(rf"{counter} = sadd\.s32 (\d+), (%s\d+)\b", text)
    if added is None:
        return limit
    first = re.search(rf"{added[2]} = sphi (%s\d+),", text)
    start = re.search(rf"{first[1]} = smov\.u32 (\d+)\b", text) if first else None
    return -(-(limit - (int(start[1]) if start else 0)) // int(added[1]))
