"""Lays what a model reads out on a mesh: every process builds the parts of a batch on its own devices.

mesh of 4 data shards, 2 processes     place of a part   0  1  2  3
                                       built by process  0  0  1  1
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np


def inside(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """Returns the context of a mesh; one that does nothing without a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def places_here(layout: jax.sharding.NamedSharding | None, shards: int) -> tuple[list[int], list[int]]:
    """Returns the places of the parts on this process's devices, and those of them that it is the first to hold."""
    if layout is None:
        return [0], [0]
    here, first = set(), {}
    for device, (index, *_) in layout.devices_indices_map((shards,)).items():
        for place in range(*index.indices(shards)):
            first[place] = min(first.get(place, device.process_index), device.process_index)
            if device.process_index == jax.process_index():
                here.add(place)
    return sorted(here), [place for place in sorted(here) if first[place] == jax.process_index()]


def placed(parts: Mapping[int, np.ndarray], shards: int, layout: jax.sharding.NamedSharding | None) -> jax.Array:
    """Returns the parts of a batch, by their places, as one array [shards, ...] on the devices.

    Args:
      parts: the parts on this process's devices, arrays of one shape.
      layout: sharding of the array; None for a single device, which has one part.
    """
    if layout is None:
        return parts[0][None]

    def take(index) -> np.ndarray:
        return np.stack([parts[place] for place in range(*index[0].indices(shards))])

    first = next(iter(parts.values()))
    return jax.make_array_from_callback((shards, *first.shape), layout, take)


def one_ahead(pool: concurrent.futures.Executor, function: Callable, items: Sequence) -> Iterator:
    """Yields function(item) of each item, while the pool already computes the next."""
    coming = [pool.submit(function, item) for item in items[:1]]
    for item in items[1:]:
        done = coming.pop().result()
        coming.append(pool.submit(function, item))
        yield done
    for last in coming:
        yield last.result()
