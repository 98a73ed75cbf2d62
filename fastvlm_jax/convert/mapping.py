"""Maps weights between PyTorch's layouts and this package's, with tables of rows that are read in both directions.

    torch name                                   path                              transform   depth
    model.layers.{i}.self_attn.q_proj.weight     params/llm/layers/q/kernel        LINEAR      24      stacked
    stem.0.reparam_conv.weight                   params/vision/stem_0/folded/...   CONV        None    one tensor
    stem.2.identity.num_batches_tracked          None                              SAME        None    a counter

A layout is a list of such rows, made for the sizes of a model. Importing one gives Leaves, which know their shape and
read only the requested part of the files: a process touches only what its devices hold, and a model is converted one
shard at a time.
"""

import concurrent.futures
import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax
import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from fastvlm_jax.models import kinds
from fastvlm_jax.models.kinds import Model

FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
COUNTERS = "counters"  # collection of the counters (num_batches_tracked), by torch name
MAX_LAYERS = 1000  # layers a stack may have: beyond any real model
_ROWS = 128  # rows of a stored tensor read and transposed at a time: three times faster than all at once


class Transform(NamedTuple):
    """Describes how torch's dimensions become ours: drop trailing ones, then transpose.

    Attributes:
      axes: torch's dimensions in our order; None keeps their order.
      ones: number of torch's trailing dimensions of size 1, which we do not have.
    """

    axes: tuple[int, ...] | None = None
    ones: int = 0

    def to_jax(self, x: np.ndarray) -> np.ndarray:
        """Returns a view of torch's array in our layout."""
        x = x[(..., *[0] * self.ones)]
        return x if self.axes is None else x.transpose(self.axes)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """Returns a view of our array in torch's layout."""
        x = x if self.axes is None else x.transpose(np.argsort(self.axes))
        return x[(..., *[None] * self.ones)]

    def torch_order(self, x: Sequence) -> tuple:
        """Reorders one item per dimension (sizes or slices) from our order to torch's, without the trailing ones."""
        return tuple(x) if self.axes is None else tuple(x[i] for i in np.argsort(self.axes))


SAME = Transform()
LINEAR = Transform((1, 0))  # [O, I] <-> [I, O]
CONV = Transform((2, 3, 1, 0))  # OIHW <-> HWIO
POINTWISE = Transform((1, 0), ones=2)  # [O, I, 1, 1] <-> [I, O]
CHANNELS = Transform(ones=2)  # [C, 1, 1] <-> [C]


class Row(NamedTuple):
    """Describes one row of a layout: a variable and the tensors that store it, or a counter.

    Attributes:
      torch: tensor name; `{i}` stands for the number of a scanned layer.
      path: '/'-joined path in the variables; None for a counter, which the model does not use.
      transform: change of dimensions of one layer's tensor.
      depth: number of scanned layers, stacked along a leading axis; None for a single tensor.
    """

    torch: str
    path: str | None
    transform: Transform = SAME
    depth: int | None = None

    def names(self) -> list[str]:
        """Returns the torch names of this row, one per layer."""
        return [self.torch] if self.depth is None else [self.torch.format(i=i) for i in range(self.depth)]


class Tensor(Protocol):
    """Describes a stored tensor that is read only when it is indexed, such as a slice of a safetensors file."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """Describes a variable that is stored in files: `leaf[index]` reads a part of it, `np.asarray(leaf)` all of it.

    Attributes:
      tensors: the stored tensor, or one per scanned layer.
      transform: change of dimensions of one layer's tensor.
      shape: shape of the variable, in our layout.
      dtype: dtype that indexing returns: the stored one, or float32 if the layers' dtypes differ.
      stacked: whether `tensors` are stacked along a leading axis.
    """

    tensors: tuple[Tensor, ...]
    transform: Transform
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool

    def __getitem__(self, index) -> np.ndarray:
        return self.read(index, self.dtype)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read((), dtype or self.dtype)

    def read(self, index, dtype) -> np.ndarray:
        """Reads the part `index` (slices) of the variable into a new array of `dtype`."""
        index = index if isinstance(index, tuple) else (index,)
        ranges = [range(*i.indices(n)) for i, n in zip(index, self.shape, strict=False)]
        ranges += [range(n) for n in self.shape[len(index) :]]
        out = _zeros([len(r) for r in ranges], np.dtype(dtype))
        inner = self.transform.torch_order([slice(r.start, r.stop) for r in ranges[self.stacked :]])
        tensors = [self.tensors[i] for i in ranges[0]] if self.stacked else self.tensors
        for layer, tensor in zip(out if self.stacked else [out], tensors, strict=True):
            self._copy(tensor, inner, layer)
        return out

    def _copy(self, tensor: Tensor, inner: tuple[slice, ...], target: np.ndarray) -> None:
        """Copies the part `inner` of a tensor into `target`, _ROWS rows at a time to transpose within the cache."""
        if not inner:
            target[...] = tensor[...]
            return
        first, *rest = inner
        across = 0 if self.transform.axes is None else self.transform.axes.index(0)
        for start in range(first.start, first.stop, _ROWS):
            rows = slice(start, min(start + _ROWS, first.stop))
            source = self.transform.to_jax(tensor[(rows, *rest)])
            part = target[(slice(None),) * across + (slice(rows.start - first.start, rows.stop - first.start),)]
            if source.dtype == ml_dtypes.bfloat16 and part.dtype == np.float32:
                part.view(np.uint16)[..., 1::2] = source.view(np.uint16)
            else:
                part[...] = source


def _zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocates zeros on pages of their own, aligned so that a CPU device takes the array over without a copy.

    np.zeros asks for huge pages, which cost a second per half a gigabyte when the memory is full of cached files.
    """
    size = math.prod(shape) * dtype.itemsize
    buffer = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(buffer, np.uint8, size).view(dtype).reshape(shape)


def read_tree(tree: Any, dtype=np.float32, put: Callable[[np.ndarray], Any] = lambda x: x) -> Any:
    """Reads all Leaves of a tree on two threads and passes each array to `put`; arrays in the tree are cast.

    Args:
      tree: a tree of Leaves and arrays.
      dtype: dtype of floating leaves; None keeps the stored one.
      put: function of each array whose result takes the leaf's place, such as `jax.device_put`.
    """

    def read(leaf):
        wanted = dtype if dtype is not None and np.dtype(leaf.dtype) in FLOATS.values() else leaf.dtype
        return put(leaf.read((), wanted) if isinstance(leaf, Leaf) else np.asarray(leaf, wanted))

    leaves, structure = jax.tree.flatten(tree)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return jax.tree.unflatten(structure, pool.map(read, leaves))


@functools.lru_cache(maxsize=16)
def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns '/'-joined path -> shape of all variables of `model`; nothing is computed."""
    tree = nn.unbox(kinds.boxed_variables(model))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def described(model_config: Mapping, file) -> tuple[Model, dict[str, tuple[int, ...]]]:
    """Builds the model that a config describes: (model, shapes of its variables).

    Args:
      model_config: arguments of `kinds.build`.
      file: where the config comes from, for messages.

    Raises:
      ValueError: no model can be built from the config; the message names the file.
    """
    try:
        model = kinds.build(**model_config)
        _check_depth(model)
        return model, shapes_of(model)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        name = "CLIP" if model_config.get("text") else "FastVLM"
        raise ValueError(f"{file} does not describe a {name}: {str(error).partition(chr(10))[0]}") from error


def _check_depth(model: Model) -> None:
    """Raises ValueError for more layers than any real model has, before anything of that length is allocated."""
    for args in (getattr(model, f"{part}_args", None) or {} for part in ("vision", "llm", "text")):
        for key in ("layers", "num_layers"):
            depths = args.get(key, ())
            depths = depths if isinstance(depths, tuple) else (depths,)
            if len(depths) > 16 or any(type(n) is not int or not 0 < n <= MAX_LAYERS for n in depths):
                raise ValueError(f"{key}={depths} must be whole numbers up to {MAX_LAYERS}")


def to_jax(rows: Iterable[Row], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where) -> dict:
    """Reads a layout forwards: turns stored tensors into variables, as Leaves.

    Counters other than int64 zeros go to the collection COUNTERS.

    Args:
      rows: the layout, for the sizes that gave `shapes`.
      tensors: all tensors of the checkpoint by name; weights are float32, bfloat16 or float16.
      shapes: shapes of all variables of the model, from `shapes_of`.
      where: the checkpoint, for messages.

    Raises:
      ValueError: a tensor is missing, unknown, or of another shape or dtype; the message names it.
    """
    rows = list(rows)
    _check_paths(rows, shapes)
    known = {name for row in rows for name in row.names()}
    if unknown := sorted(set(tensors) - known):
        raise ValueError(f"{where}: tensor {unknown[0]} is not part of this model ({len(unknown)} such tensors)")
    flat, counters = {}, {}
    for row in rows:
        if row.path is None:
            stored = {name: np.asarray(tensors[name][...]) for name in row.names() if name in tensors}
            counters |= {name: x for name, x in stored.items() if x.any() or x.dtype != np.int64}
            continue
        shape, stacked = shapes[row.path], row.depth is not None
        expected = row.transform.torch_order(shape[stacked:]) + (1,) * row.transform.ones
        if row.depth is not None and shape[0] != row.depth:
            raise ValueError(f"the mapping table gives {row.path} {row.depth} layers, the model {shape[0]}")
        for name in row.names():
            if name not in tensors:
                raise ValueError(f"{where}: tensor {name} is missing: is config.json from another model?")
            if (found := tuple(tensors[name].get_shape())) != expected:
                raise ValueError(f"{where}: tensor {name} has shape {found}, the model asks for {expected}")
            if tensors[name].get_dtype() not in FLOATS:
                raise ValueError(f"{where}: tensor {name} is {tensors[name].get_dtype()}, not {' or '.join(FLOATS)}")
        stored = tuple(tensors[name] for name in row.names())
        dtypes = {FLOATS[tensor.get_dtype()] for tensor in stored}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        flat[row.path] = Leaf(stored, row.transform, shape, dtype, stacked)
    tree = flax.traverse_util.unflatten_dict(flat, sep="/")
    return {**tree, COUNTERS: counters} if counters else tree


@dataclasses.dataclass(frozen=True, eq=False)
class Outgoing:
    """Describes a tensor to be written: torch shape and stored dtype; `read()` or `np.asarray` returns its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.read(), dtype)


def to_torch(rows: Iterable[Row], variables: dict, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Outgoing]:
    """Reads a layout backwards: turns variables (arrays or Leaves) into tensors by torch name; no values are read yet.

    Counters keep the values that `to_jax` read from this layout; all others are int64 zeros.

    Args:
      rows: the layout, for the sizes that gave `shapes`.
      variables: the model's variables, with or without the collection COUNTERS.
      shapes: shapes of all variables of the model, from `shapes_of`.

    Raises:
      ValueError: a variable is missing, unknown, or of another shape than in `shapes`; the message names it.
    """
    rows = list(rows)
    variables = dict(variables)
    counters = variables.pop(COUNTERS, {})
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    _check_paths(rows, shapes)
    if differing := sorted(set(flat) ^ set(shapes)):
        state = "is not part of this model" if differing[0] in flat else "is missing"
        raise ValueError(
            f"variable {differing[0]} {state} ({len(differing)} differ): is the model config from another model?"
        )
    tensors = {}
    for row in rows:
        if row.path is None:
            for name in row.names():
                counter = counters.get(name, np.zeros((), np.int64))
                tensors[name] = Outgoing(counter.shape, counter.dtype, lambda counter=counter: counter)
            continue
        leaf = flat[row.path]
        if leaf.shape != shapes[row.path]:
            raise ValueError(f"variable {row.path} has shape {leaf.shape}, the config asks for {shapes[row.path]}")
        for i, name in enumerate(row.names()):
            tensors[name] = _outgoing(leaf, row, i)
    return tensors


def _outgoing(leaf, row: Row, i: int) -> Outgoing:
    """Describes the tensor of a row's layer `i`."""
    inner = leaf.shape[row.depth is not None :]

    def read() -> np.ndarray:
        if row.depth is None:
            return row.transform.to_torch(np.asarray(leaf))
        return row.transform.to_torch(np.asarray(leaf[i : i + 1])[0])

    return Outgoing(row.transform.torch_order(inner) + (1,) * row.transform.ones, np.dtype(leaf.dtype), read)


def _check_paths(rows: list[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the rows cover each variable once; a gap is an error of this package, not of a file."""
    paths = [row.path for row in rows if row.path is not None]
    if len(set(paths)) != len(paths) or set(paths) != set(shapes):
        wrong = sorted(set(paths) ^ set(shapes)) or sorted(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"the mapping table and the model disagree about {wrong[0]}")
