"""Holds published figures of chips: TPU generations for preflight and metrics, NVIDIA GPUs for metrics."""

import dataclasses
from collections.abc import Sequence

import jax

GB, GiB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """Describes a TPU generation; figures are per chip unless they say per device.

    Attributes:
      prefix: the compiler's name for the generation.
      flops: peak bf16 FLOP/s.
      flops_per_cycle: FLOPs that the matrix units of a chip finish in a cycle.
      hbm: bytes of memory.
      hbm_bandwidth: bytes/s of that memory.
      hbm_limit: bytes per device that the compiler lets a program use, by its own message; less than the HBM.
      link: bytes/s of one ICI link in one direction.
      dcn: bytes/s of a chip's share of its host's network.
      shapes: slices that Cloud TPU offers, in chips along each axis; with three axes also multiples of 4x4x4.
      largest: chips in the largest slice.
      ring: length from which the links along an axis form a ring by default; 0 = along every axis of a slice that
        consists of whole 4x4x4 cubes.
      rows_per_cycle: rows of bf16 that a matrix unit takes in a cycle.
      devices_per_chip: devices that JAX shows for a chip; v7x has two, the others one.
    """

    prefix: str
    flops: float
    flops_per_cycle: int
    hbm: float
    hbm_bandwidth: float
    hbm_limit: float
    link: float
    dcn: float
    shapes: Sequence[tuple[int, ...]]
    largest: int
    ring: int
    rows_per_cycle: int = 1
    devices_per_chip: int = 1

    @property
    def clock(self) -> float:
        """Returns the clock, cycles a second."""
        return self.flops / self.flops_per_cycle


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16))
# Peak, HBM, ICI and the shapes: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, seen in 2026. A link is
# the page's "bidirectional ICI bandwidth per chip" over 2 directions and 4 links (v5e, v6e) or 6; v4's is 50 GB/s, by
# table 4 of arXiv 2304.01433. DCN: v5e 2 x 100 Gbit/s and v6e 4 x 200 Gbit/s a host of 8 chips, v5p 50 Gbit/s a chip
# (the same pages); v4 and v7x have v5p's figure here, because their pages name none. Matrix units: v4, v5e and v5p have
# 4 of 128 x 128 a core; v6e and v7x have 2 of 256 x 256 a core, for which the compiler counts twice as many FLOPs per
# cell and cycle. hbm_limit: libtpu 0.0.52.
GENERATIONS = {
    "v4": Generation(
        "v4", 275e12, 262_144, 32 * GiB, 1200 * GB, 30.75 * GiB, 50 * GB, 6.25 * GB, DEEP, 4096, 0
    ),
    "v5e": Generation(
        "v5e", 197e12, 131_072, 16 * GiB, 819 * GB, 15.75 * GiB, 50 * GB, 3.125 * GB, FLAT, 256, 16
    ),
    "v5p": Generation(
        "v5p", 459e12, 262_144, 95 * GiB, 2765 * GB, 95.73 * GiB, 100 * GB, 6.25 * GB, DEEP, 6144, 0
    ),
    "v6e": Generation(
        "v6e", 918e12, 524_288, 32 * GiB, 1600 * GB, 31.24 * GiB, 100 * GB, 12.5 * GB, FLAT, 256, 16, 2
    ),
    "v7x": Generation(
        "tpu7x", 2307e12, 1_048_576, 192 * GiB, 7380 * GB, 94.74 * GiB, 100 * GB, 6.25 * GB, DEEP, 9216, 0, 2, 2
    ),
}  # fmt: skip


# Peak bf16 FLOP/s of a chip by the start of JAX's device_kind, without sparsity. NVIDIA: the data sheets of A100, H100
# and H200 (https://www.nvidia.com/en-us/data-center/h200/), SXM unless the name says another form.
PEAK_FLOPS = {
    "TPU v4": GENERATIONS["v4"].flops,
    "TPU v5 lite": GENERATIONS["v5e"].flops,
    "TPU v5": GENERATIONS["v5p"].flops,
    "TPU v6 lite": GENERATIONS["v6e"].flops,
    "TPU7x": GENERATIONS["v7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Returns the peak bf16 FLOP/s of the chips of all `devices`; None where it is unknown, as on a CPU."""
    known = [kind for kind in PEAK_FLOPS if devices[0].device_kind.startswith(kind)]
    if not known:
        return None
    # JAX shows a chip of v7x, and of v4 without megacore, as two devices.
    chips = {(getattr(d, "slice_index", 0), *getattr(d, "coords", (d.id,))) for d in devices}
    return len(chips) * PEAK_FLOPS[max(known, key=len)]
