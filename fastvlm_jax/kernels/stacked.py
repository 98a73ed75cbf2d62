"""Maps that lie in a stack, one for each block of a stage: kernels for TPU read and write them in their place.

A loop that carries such a stack copies nothing. `lax.scan` would copy each map into the stack of its results, and out
of the stack of its inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layer(NamedTuple):
    """Names one array of a stack.

    Attributes:
      maps: the stack [L, ...].
      at: its number, an int32 scalar.
    """

    maps: jax.Array
    at: jax.Array | int


def layer(x: jax.Array | Layer) -> Layer:
    """Returns an array as the only one of a stack; a layer as it is."""
    return x if isinstance(x, Layer) else Layer(x[None], 0)


def shape(x: jax.Array | Layer) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array, or of a layer without the axis of its stack."""
    return jax.ShapeDtypeStruct(*((x.maps.shape[1:], x.maps.dtype) if isinstance(x, Layer) else (x.shape, x.dtype)))


def new(like: jax.ShapeDtypeStruct, layers: int = 1) -> Layer:
    """Returns the first layer of a new stack, whose values are not defined."""
    return Layer(jax.lax.empty((layers, *like.shape), like.dtype), 0)


def places(*layers: Layer) -> jax.Array:
    """Returns the numbers of layers, int32, for the index maps of a kernel."""
    return jnp.stack([jnp.asarray(each.at, jnp.int32) for each in layers])
