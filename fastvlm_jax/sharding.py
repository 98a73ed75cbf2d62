"""The mesh and the one table from logical axes to mesh axes. No other file spells a mesh axis."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("replica", "data", "fsdp", "tensor")

# Logical axis -> mesh axes. A vocabulary x embed-sharded table would be rematerialised whole at every lookup,
# so the embedding table declares ("vocab", None).
LOGICAL_AXES = {
    "batch": ("replica", "data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("fsdp", "tensor"),
}
# Parameters that declare no axes (the convolutional encoder) shard their largest divisible dimension above this size.
MIN_SHARDED_ELEMENTS = 2**18


def make_mesh(sizes: Sequence[int] = (1, -1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over (replica, data, fsdp, tensor); one size may be -1 and takes the devices that are left.

    Raises:
      ValueError: the sizes do not multiply out to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(sizes)
    if len(sizes) != len(MESH_AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(
            f"mesh={tuple(sizes)}: give {len(MESH_AXES)} sizes {MESH_AXES}, positive, at most one of them -1"
        )
    if -1 in sizes:
        known = -math.prod(sizes)
        if len(devices) % known:
            raise ValueError(f"mesh={tuple(sizes)}: {known} does not divide the {len(devices)} devices")
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh={tuple(sizes)}: needs {math.prod(sizes)} devices, there are {len(devices)}; use -1 once"
        )
    # Linen's logical metadata needs Auto axes; jax.make_mesh and Mesh default to Explicit ones.
    return Mesh(np.array(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_mesh(mesh: Mesh, *, groups: int, num_kv_heads: int) -> None:
    """Refuses a mesh that cannot divide the groups of a batch or the heads of the decoder (ValueError)."""
    shards = math.prod(mesh.shape[a] for a in LOGICAL_AXES["batch"])
    if groups % shards:
        raise ValueError(
            f"data.groups={groups} does not divide over {shards} data shards; make it a multiple of {shards}"
        )
    if num_kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"mesh: the tensor axis of {mesh.shape['tensor']} does not divide {num_kv_heads} key-value heads; use fsdp"
        )


def sharded(init, axes: Sequence[str | None]):
    """An initializer whose parameter carries the logical name of each of its axes; an unknown name raises KeyError."""
    for axis in axes:
        if axis is not None:
            LOGICAL_AXES[axis]
    return nn.with_logical_partitioning(init, tuple(axes))


def spec(axes: Sequence[str | None]) -> P:
    """PartitionSpec of logical axes."""
    return P(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Fixes the sharding of an activation inside `jax.set_mesh`; without a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every field of a Batch: groups over all data axes."""
    return NamedSharding(mesh, spec(("batch",)))


def shardings_of(abstract, mesh: Mesh):
    """NamedShardings for a tree from `jax.eval_shape(init)`, boxed parameters by their logical axes.

    Unboxed leaves of at least MIN_SHARDED_ELEMENTS shard their largest dimension that fsdp divides, others replicate.

    Raises:
      ValueError: a mesh axis does not divide the dimension that declares it.
    """
    fsdp = mesh.shape["fsdp"]

    def leaf(path, x):
        if isinstance(x, nn.LogicallyPartitioned):
            for size, axis in zip(x.value.shape, x.names, strict=True):
                shards = math.prod(mesh.shape[name] for name in LOGICAL_AXES.get(axis, ()))
                if size % shards:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise ValueError(f"{name}: the mesh splits {axis!r} in {shards}, which does not divide {size}")
            return NamedSharding(mesh, spec(x.names))
        if fsdp > 1 and math.prod(x.shape) >= MIN_SHARDED_ELEMENTS:
            divisible = [i for i, size in enumerate(x.shape) if size % fsdp == 0]
            if divisible:
                largest = max(divisible, key=lambda i: x.shape[i])
                return NamedSharding(mesh, P(*("fsdp" if i == largest else None for i in range(len(x.shape)))))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def place(leaf, layout: NamedSharding) -> jax.Array:
    """A float32 array laid out by `layout`; of a leaf in a file (convert.mapping.Leaf), each device's part is read."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return jax.device_put(np.asarray(leaf, np.float32), layout)
    return jax.make_array_from_callback(leaf.shape, layout, lambda index: leaf.read(index, np.float32))
