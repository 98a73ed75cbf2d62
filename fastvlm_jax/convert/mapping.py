"""Weight names and layouts of PyTorch and of this package, in rows that are read both ways.

    torch name                                   path                              transform   depth
    model.layers.{i}.self_attn.q_proj.weight     params/llm/layers/q/kernel        LINEAR      24      stacked
    stem.0.reparam_conv.weight                   params/vision/stem_0/folded/...   CONV        None    one tensor
    stem.2.identity.num_batches_tracked          None                              SAME        None    written as 0

A layout is a list of such rows, made for the sizes of a model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.fastvlm import FastVLM

FLOATS = ("F32", "BF16", "F16")


class Transform(NamedTuple):
    """A change of layout and its exact inverse; both give views."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda w: w.T, lambda w: w.T)  # [O, I] <-> [I, O]
CONV = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINTWISE = Transform(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # [O, I, 1, 1] <-> [I, O]
CHANNELS = Transform(lambda w: w[:, 0, 0], lambda w: w[:, None, None])  # [C, 1, 1] <-> [C]


class Row(NamedTuple):
    """One line of a layout.

    Attributes:
      torch: tensor name; `{i}` numbers the layers that are scanned.
      path: '/'-joined path in the variables; None for a counter that computes nothing.
      transform: of one layer's tensor.
      depth: number of scanned layers, stacked along a leading axis; None where nothing is scanned.
    """

    torch: str
    path: str | None
    transform: Transform = SAME
    depth: int | None = None

    def names(self) -> list[str]:
        """The torch names of this row, a layer each."""
        return [self.torch] if self.depth is None else [self.torch.format(i=i) for i in range(self.depth)]


class Tensor(Protocol):
    """What import needs of a stored tensor: nothing is read before it is indexed (safetensors' get_slice)."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index) -> np.ndarray: ...


def shapes_of(model: FastVLM) -> dict[str, tuple[int, ...]]:
    """'/'-joined path -> shape of all variables of `model`; nothing is computed."""
    size = 2 ** (len(model.vision_args["layers"]) + 1)
    token = jnp.zeros((1, 1), jnp.int32)
    images = jnp.zeros((1, size, size, 3), jnp.float32)
    tree = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images, token, token, token, token))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def described(model_config: Mapping, file) -> tuple[FastVLM, dict[str, tuple[int, ...]]]:
    """The model that the config read from `file` describes, and the shapes of its variables.

    Raises:
      ValueError: naming the file, where no model can be built from it.
    """
    try:
        model = fastvlm.build(**model_config)
        return model, shapes_of(model)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} does not describe a FastVLM: {str(error).partition(chr(10))[0]}") from error


def to_jax(rows: Iterable[Row], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where) -> dict:
    """Reads a layout forwards: stored tensors to variables of float32 numpy arrays, one tensor in memory at a time.

    Args:
      rows: the layout, for the sizes that gave `shapes`.
      tensors: everything the checkpoint holds, by name; float32, bfloat16 or float16.
      shapes: of all variables wanted, from `shapes_of`.
      where: the checkpoint, for messages.

    Raises:
      ValueError: naming the tensor, where one is missing, unknown, or of another shape or dtype.
    """
    rows = list(rows)
    _check_paths(rows, shapes)
    known = {name for row in rows for name in row.names()}
    if unknown := sorted(set(tensors) - known):
        raise ValueError(f"{where}: tensor {unknown[0]} is none of this model's ({len(unknown)} are not)")
    flat = {}
    for row in rows:
        if row.path is None:
            continue
        shape = shapes[row.path]
        flat[row.path] = np.empty(shape, np.float32)
        layers = [flat[row.path]] if row.depth is None else flat[row.path]
        for name, layer in zip(row.names(), layers, strict=True):
            if name not in tensors:
                raise ValueError(f"{where}: tensor {name} is missing: is config.json another model's?")
            expected, found = row.transform.to_torch(layer).shape, tuple(tensors[name].get_shape())
            if found != expected:
                raise ValueError(f"{where}: tensor {name} has shape {found}, config.json asks for {expected}")
            if tensors[name].get_dtype() not in FLOATS:
                raise ValueError(f"{where}: tensor {name} is {tensors[name].get_dtype()}, not {' or '.join(FLOATS)}")
            layer[...] = row.transform.to_jax(tensors[name][:])
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(rows: Iterable[Row], variables: dict, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads a layout backwards: variables to tensors by torch name, views where numpy can; counters are int64 zeros.

    Raises:
      ValueError: naming the variable, where one is missing, unknown, or of another shape than in `shapes`.
    """
    rows = list(rows)
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    _check_paths(rows, shapes)
    if differing := sorted(set(flat) ^ set(shapes)):
        state = "is none of this model's" if differing[0] in flat else "is missing"
        raise ValueError(f"variable {differing[0]} {state} ({len(differing)} differ): is the model config another's?")
    tensors = {}
    for row in rows:
        if row.path is None:
            tensors |= {name: np.zeros((), np.int64) for name in row.names()}
            continue
        leaf = np.asarray(flat[row.path])
        if leaf.shape != shapes[row.path]:
            raise ValueError(f"variable {row.path} has shape {leaf.shape}, the config asks for {shapes[row.path]}")
        layers = [leaf] if row.depth is None else leaf
        tensors |= {name: row.transform.to_torch(layer) for name, layer in zip(row.names(), layers, strict=True)}
    return tensors


def _check_paths(rows: list[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A table that does not cover the model is a mistake in this package, not in anybody's files."""
    paths = [row.path for row in rows if row.path is not None]
    if len(set(paths)) != len(paths) or set(paths) != set(shapes):
        wrong = sorted(set(paths) ^ set(shapes)) or sorted(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"the mapping table and the model disagree about {wrong[0]}")
