"""A training state without a model: an array for each dtype and kind that checkpoints hold, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fastvlm_jax import guard
from fastvlm_jax.train_state import TrainState

LAYOUTS = {"wide": (None, "fsdp"), "tall": ("fsdp",), "half": ("fsdp",)}  # all others are replicated


def small_state(mesh, step, rows=64):
    """The state of a step on a mesh with the axis "fsdp": other numbers at each step, the same on every mesh."""
    rng = np.random.default_rng(step)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    params = {"llm": {"wide": normal(3, rows), "bias": normal(5)}, "vision": {"tall": normal(rows, 7, 3)}}
    slots = ({"mu": {"llm/half": jnp.asarray(normal(rows, 4), jnp.bfloat16)}, "count": np.int32(step)}, ())
    known = guard.Guard(np.abs(normal(guard.WINDOW)), np.int32(step), np.int32(0))
    state = TrainState(np.int32(step), params, {"vision": {"mean": normal(16)}}, slots, known)

    def placed(path, x):
        names = LAYOUTS.get(jax.tree_util.keystr(path[-1:], simple=True).split("/")[-1], ())
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    return jax.tree_util.tree_map_with_path(placed, state)


def small_mesh(devices):
    return jax.make_mesh((len(devices),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
