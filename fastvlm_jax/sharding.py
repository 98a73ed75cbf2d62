"""Makes the mesh and maps logical axes to mesh axes. No other file names a mesh axis."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("replica", "data", "fsdp", "tensor")

# Logical axis -> mesh axes. A table that is sharded along vocabulary and embed would be gathered whole at every lookup,
# so the embedding table declares ("vocab", None). In "vocab", tensor comes first, so that a gather over fsdp is
# contiguous.
LOGICAL_AXES = {
    "batch": ("replica", "data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor", "fsdp"),
    "words": ("tensor",),  # the vocabulary where a layer uses it: gathered along fsdp
}
# Parameters that declare no axes (those of the convolutional encoder) and have at least this many elements are sharded
# along their largest dimension that fsdp divides.
MIN_SHARDED_ELEMENTS = 2**18


def make_mesh(sizes: Sequence[int] = (1, -1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over (replica, data, fsdp, tensor); a size of -1 takes the devices that are left.

    The axes follow the links of a TPU slice. With several slices, only `replica` crosses between them; a size of 1 for
    `replica` becomes the number of slices if another size is -1:

        2 slices of 4, (2, 1, 4, 1):    slice 0  d0 d1 d2 d3    replica 0
                                        slice 1  d4 d5 d6 d7    replica 1; only gradients cross between replicas

    Raises:
      ValueError: the sizes do not multiply out to the number of devices, or the slices do not divide `replica`.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    sizes = mesh_sizes(sizes, len(devices), slices)
    # Linen's logical metadata needs Auto axes; jax.make_mesh and Mesh default to Explicit ones.
    return Mesh(_arranged(devices, sizes, slices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(sizes: Sequence[int], devices: int, slices: int = 1) -> list[int]:
    """Returns the sizes of a mesh over a number of devices with -1 filled in; see `make_mesh`, also for errors."""
    sizes = list(sizes)
    if len(sizes) != len(MESH_AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(
            f"mesh={tuple(sizes)}: give {len(MESH_AXES)} sizes {MESH_AXES}, positive, at most one of them -1"
        )
    if -1 in sizes:
        if sizes[0] == 1:
            sizes[0] = slices
        known = -math.prod(sizes)
        if devices % known:
            raise ValueError(f"mesh={tuple(sizes)}: {known} does not divide the {devices} devices")
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ValueError(f"mesh={tuple(sizes)}: needs {math.prod(sizes)} devices, there are {devices}; use -1 once")
    return sizes


def abstract_mesh(sizes: Sequence[int]) -> jax.sharding.AbstractMesh:
    """Returns a mesh of these sizes without devices: programs can be traced on it, and shards counted."""
    return jax.sharding.AbstractMesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: list[jax.Device], sizes: list[int], slices: int) -> np.ndarray:
    """Returns the devices in the shape of the mesh; neighbours on an axis are neighbours on a TPU's links."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh={tuple(sizes)}: there are {slices} slices, which only the replica axis may cross; "
            f"make its size, the first, a multiple of {slices}"
        )
    within = [sizes[0] // slices, *sizes[1:]]
    if slices > 1:
        across = [slices, *[1] * (len(sizes) - 1)]
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)


def check_mesh(mesh: Mesh, *, groups: int, num_kv_heads: int, accumulate: int = 1) -> None:
    """Raises ValueError for a mesh that does not divide the groups of a batch or the heads of the decoder."""
    shards = math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])
    if groups % shards:
        raise ValueError(
            f"data.groups={groups} does not divide over {shards} data shards; make it a multiple of {shards}"
        )
    if groups % (shards * accumulate):
        raise ValueError(
            f"accumulate={accumulate} does not divide the {groups // shards} groups of a data shard; make data.groups "
            f"a multiple of {shards * accumulate}"
        )
    if num_kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"mesh: the tensor axis of {mesh.shape['tensor']} does not divide {num_kv_heads} key-value heads; use fsdp"
        )


def sharded(init, axes: Sequence[str | None]):
    """Returns an initializer that names the logical axis of each dimension; raises KeyError for an unknown name."""
    for axis in axes:
        if axis is not None:
            LOGICAL_AXES[axis]
    return nn.with_logical_partitioning(init, tuple(axes))


def spec(axes: Sequence[str | None]) -> P:
    """Returns the PartitionSpec of logical axes."""
    return P(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Fixes the sharding of an activation inside `jax.set_mesh`; without a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(param: jax.Array, axes: Sequence[str | None] | None, dtype) -> jax.Array:
    """Returns a parameter as a layer uses it: in `dtype`, whole along fsdp, still sharded along tensor.

    A layer calls this where it uses the parameter, so that one layer's weights are gathered at a time, in the dtype of
    the computation, and the partitioner moves no activations instead. The gradient has the dtype of the parameter and
    is reduced into the shards that the state keeps.

    Args:
      axes: logical axes that `sharded` declared; None for a parameter without axes.
    """
    param = param.astype(dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return param
    kept = [tuple(a for a in LOGICAL_AXES.get(axis, ()) if a != "fsdp") or None for axis in axes or [None] * param.ndim]
    return jax.lax.with_sharding_constraint(param, P(*kept))


def _gathered_forward(param, axes, dtype):
    return gathered(param, axes, dtype), jnp.zeros((), param.dtype)


def _gathered_backward(axes, dtype, like, gradient):
    return (gradient.astype(like.dtype),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def device_kind() -> str:
    """Returns the kind of device that a program is made for, as "TPU v5 lite" or "cpu".

    It is that of the mesh of `jax.set_mesh`; without a mesh, or with one that names no device, that of this process.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def device_cores() -> int:
    """Returns the number of cores of such a device that share a kernel; 1 without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device and device.num_cores) or 1


def batch_shards() -> int:
    """Returns the number of data shards in the mesh of `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def images_here(images: int) -> int:
    """Returns how many images of a batch a device computes: all if they do not divide over the devices."""
    shards = batch_shards()
    return images // shards if images % shards == 0 else images


def map_axes(images: int) -> tuple[str | None, ...]:
    """Returns the logical axes of maps [B, H, W, C] for `on_shards`; all None where each device computes all images."""
    return ("batch" if images_here(images) < images else None, None, None, None)


def on_shards(function, in_axes: Sequence[Any], out_axes: Any):
    """Returns `function` applied to each device's shards of its arguments; without a mesh, to the whole arguments.

    Use it where the partitioner does not split well by itself. The function exchanges values between devices itself,
    with the functions for words and for batches below.

    Args:
      in_axes, out_axes: logical axes, a tuple of names, of each argument and of the result, or trees of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    in_specs, out_specs = jax.tree.map(spec, (tuple(in_axes), out_axes), is_leaf=_are_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _are_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)


def words_here(words: int) -> int:
    """Returns the number of a vocabulary's words that a device holds while a layer uses them."""
    mesh = jax.sharding.get_abstract_mesh()
    return words if mesh.empty else words // mesh.shape["tensor"]


def first_word(count: int) -> jax.Array | int:
    """Returns, inside `on_shards`, the number of this device's first word; each device holds `count` words."""
    return 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index("tensor") * count


def sum_words(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, the sum over the devices that hold the other words."""
    return jax.lax.psum(x, "tensor") if _words_are_split() else x


def max_words(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, the maximum over the devices that hold the other words."""
    return jax.lax.pmax(x, "tensor") if _words_are_split() else x


def _words_are_split() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def table_axes(words: int) -> tuple[str | None, ...]:
    """Returns the logical axes of a table's gradient [words, D]; whole along fsdp if shards do not divide the words."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["vocab"])
    return ("words" if words % shards else "vocab", None)


def reduce_words(gradient_VD: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, the gradient of "words" summed over all rows, sharded as `table_axes` says."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return gradient_VD
    if len(gradient_VD) % mesh.shape["fsdp"]:
        return jax.lax.psum(gradient_VD, LOGICAL_AXES["batch"])
    return jax.lax.psum(jax.lax.psum_scatter(gradient_VD, "fsdp", tiled=True), ("replica", "data"))


def first_of_batch(count: int) -> jax.Array | int:
    """Returns, inside `on_shards`, the place in the batch of this device's first entry; each device holds `count`."""
    return jax.lax.axis_index(LOGICAL_AXES["batch"]) * count if batch_shards() > 1 else 0


def sum_batch(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, the sum over the devices that hold other parts of the batch."""
    return jax.lax.psum(x, LOGICAL_AXES["batch"]) if batch_shards() > 1 else x


def max_batch(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, the maximum over the devices that hold other parts of the batch."""
    return jax.lax.pmax(x, LOGICAL_AXES["batch"]) if batch_shards() > 1 else x


def gather_batch(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, the entries of the whole batch from those of each device."""
    return jax.lax.all_gather(x, LOGICAL_AXES["batch"], tiled=True) if batch_shards() > 1 else x


def scatter_batch(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, this device's entries of the sum of all devices' arrays of the whole batch."""
    return jax.lax.psum_scatter(x, LOGICAL_AXES["batch"], tiled=True) if batch_shards() > 1 else x


def own_of_batch(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, this device's entries of an array of the whole batch."""
    count = len(x) // batch_shards()
    return jax.lax.dynamic_slice_in_dim(x, first_of_batch(count), count)


def pass_on(x: jax.Array) -> jax.Array:
    """Returns, inside `on_shards`, what the device holds that is before this one on a ring of the data axes."""
    shards = batch_shards()
    if shards == 1:
        return x
    return jax.lax.ppermute(x, LOGICAL_AXES["batch"], [(i, (i + 1) % shards) for i in range(shards)])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every field of a Batch: its groups are split over all data axes."""
    return NamedSharding(mesh, spec(("batch",)))


def shardings_of(abstract, mesh: Mesh, whole: Callable[[str], bool] = lambda path: False):
    """Returns NamedShardings for a tree from `jax.eval_shape(init)`; boxed parameters follow their logical axes.

    Unboxed leaves of at least MIN_SHARDED_ELEMENTS are sharded along their largest dimension that fsdp divides; others
    are replicated. So are leaves in a parameter's box that have lost its shape, as Adafactor's rows and columns have.

    Args:
      whole: predicate on a leaf's path ("params/llm/..."); True keeps the leaf whole along fsdp.

    Raises:
      ValueError: a mesh axis does not divide a dimension that declares it; the message names the parameter.
    """

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fsdp = 1 if whole(name) else mesh.shape["fsdp"]
        if isinstance(x, nn.LogicallyPartitioned) and (len(x.names) != len(x.value.shape) or x.value.shape == (1,)):
            x = x.value
        if isinstance(x, nn.LogicallyPartitioned):
            used = [tuple(a for a in LOGICAL_AXES.get(axis, ()) if a != "fsdp" or fsdp > 1) for axis in x.names]
            for size, axis, names in zip(x.value.shape, x.names, used, strict=True):
                shards = math.prod(mesh.shape[a] for a in names)
                if size % shards:
                    raise ValueError(
                        f"{name}: the mesh splits {axis!r} in {shards}, which does not divide {size}; give fsdp or "
                        "tensor a smaller size and data the rest"
                    )
            return NamedSharding(mesh, P(*(names or None for names in used)))
        if fsdp > 1 and math.prod(x.shape) >= MIN_SHARDED_ELEMENTS:
            divisible = [i for i, size in enumerate(x.shape) if size % fsdp == 0]
            if divisible:
                largest = max(divisible, key=lambda i: x.shape[i])
                return NamedSharding(mesh, P(*("fsdp" if i == largest else None for i in range(len(x.shape)))))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def of_layer(stacked: NamedSharding, _: int = 0) -> NamedSharding:
    """Returns the sharding of any one layer's array from that of the layers' arrays stacked along a leading axis."""
    return NamedSharding(stacked.mesh, P(*stacked.spec[1:]))


def place(leaf, layout: NamedSharding, dtype=np.float32) -> jax.Array:
    """Returns an array of `dtype` with the sharding `layout`.

    Args:
      leaf: an array, or a Leaf (convert/mapping.py) that lies in a file: each process reads the shards of its devices.
    """
    if isinstance(leaf, jax.Array | np.ndarray):
        leaf = np.asarray(leaf, dtype)
        return jax.make_array_from_callback(leaf.shape, layout, lambda index: leaf[index])
    return jax.make_array_from_callback(leaf.shape, layout, lambda index: leaf.read(index, dtype))
