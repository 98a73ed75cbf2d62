"""Data settings, meshes and batches for the tests of loading."""

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

GROUPS = 8


def config(folder, **changes):
    values = {
        "path": str(folder), "root": "", "mixture": (), "template": "chatml", "image_size": 16, "resolutions": (),
        "aspects": (), "decode": "fast", "turns": "separate", "overlong": "truncate", "max_substituted": 0.01,
        "groups": GROUPS, "images_per_group": 3, "rows_per_group": 4, "row_length": 64, "cache_images": False,
        "num_threads": 2, "prefetch": 4,
    }  # fmt: skip
    return ml_collections.ConfigDict(values | changes)


def sharding(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("data"))


def take(loader, count):
    try:
        return [jax.tree.map(np.asarray, next(loader)) for _ in range(count)]
    finally:
        loader.close()


def segments_of(batch):
    """Yields (group, row, positions of one segment) of a Batch."""
    for group, row in np.ndindex(batch.tokens.shape[:2]):
        for number in range(1, batch.segment_ids[group, row].max(initial=0) + 1):
            yield group, row, np.flatnonzero(batch.segment_ids[group, row] == number)
