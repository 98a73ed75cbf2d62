"""Estimates the cycles of Pallas kernels, to which the compiler gives none, and lists them."""

from typing import Any

from fastvlm_jax.preflight.hlo.cost import Operation, Program
from fastvlm_jax.preflight.topology import Slice

PEAK = "peak rates, no schedule"


def cycles(kernel: Operation, slices: Slice) -> tuple[float, str]:
    """Estimates the cycles of one run of a kernel, and what they are: the longest of the terms that it has to wait for.

    The bundles of its schedule and the time of the matrix units that it keeps busy; where the compiler wrote no
    schedule, its FLOPs at the peak rate. And the bytes of its blocks at the bandwidth of HBM.
    """
    generation = slices.generation
    terms = {"HBM": kernel.traffic / slices.device_bandwidth * generation.clock}
    if kernel.schedule:
        terms |= {"bundles": kernel.schedule.bundles, "matrix units": kernel.schedule.rows / generation.rows_per_cycle}
    else:
        terms[PEAK] = kernel.kernel_flops / slices.device_flops * generation.clock
    bound, most = max(terms.items(), key=lambda term: term[1])
    return most, bound if kernel.schedule else PEAK


def listed(found: Program, slices: Slice) -> list[dict[str, Any]]:
    """Returns the kernels of a program, costliest first: name, runs, cycles of them all, what they are, and the loops
    of unknown trips in them, which count once.
    """
    rows = {}
    for operation in found.operations:
        if operation.kernel:
            one, bound = cycles(operation, slices)
            unknown = operation.schedule.unknown if operation.schedule else 0
            row = rows.setdefault((operation.kernel, bound, unknown), {"runs": 0, "cycles": 0.0})
            row["runs"] += operation.trips
            row["cycles"] += one * operation.trips
    listed = [
        {"kernel": name, "bound": bound, "unknown": unknown, **row} for (name, bound, unknown), row in rows.items()
    ]
    return sorted(listed, key=lambda row: -row["cycles"])
