"""Estimates how long a transfer takes between the chips of a slice, and between slices: its bytes over the links."""

from collections.abc import Sequence

import numpy as np

from fastvlm_jax.preflight.hlo.cost import Collective
from fastvlm_jax.preflight.topology import Slice

HOP = 1e-6  # seconds for the first byte to pass one link; a common rule of thumb, not a published figure


def seconds(collective: Collective, slices: Slice, devices: Sequence) -> float:
    """Estimates the seconds of one trip of a transfer.

    Between chips, each axis of the slice along which the group lies contributes its links, twice if they form a ring;
    groups between the members share them. A byte passes each link once in a gather or a scatter, twice in an
    all-reduce. Between slices, the bandwidth is the chip's share of the host's network.

    Args:
      devices: devices of the mesh, in its order.
    """
    generation, n = slices.generation, len(collective.group)
    if not n:
        twice = 2 * (slices.num_slices - 1) / slices.num_slices if collective.kind == "all-reduce" else 1
        return twice * collective.payload * generation.devices_per_chip / generation.dcn
    if n == 1:
        return 0.0
    bandwidth, hops = link_bandwidth([devices[i].coords for i in collective.group if i < len(devices)], slices)
    moved = collective.payload * (n - 1) / n
    if collective.kind == "all-reduce":
        moved, hops = 2 * moved, 2 * hops
    elif collective.kind == "collective-permute":
        moved, hops = collective.payload, 1
    elif "all-to-all" in collective.kind:
        moved = collective.payload * (n - 1) / n / 4 * max(1, n / 4)  # each byte crosses a quarter of the ring
    return moved / bandwidth + hops * HOP


def link_bandwidth(coords: Sequence[Sequence[int]], slices: Slice) -> tuple[float, int]:
    """Returns the bytes/s that flow into each chip of a group, and the links from one end of the group to the other."""
    link = slices.generation.link / slices.generation.devices_per_chip
    total, hops = 0.0, 0
    for axis, size in enumerate(slices.shape):
        places = sorted({c[axis] for c in coords})
        if len(places) < 2:
            continue
        stride = int(min(np.diff(places)))
        ring = slices.is_ring(axis) and len(places) * stride == size
        total += link * (2 if ring else 1) / stride
        hops += (places[-1] - places[0]) // (2 if ring else 1)
    return (total or link), max(hops, 1)
