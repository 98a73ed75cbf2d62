"""Maps that lie in a stack, one for each block of a stage: kernels for TPU read and write them in their place.

A loop that carries such a stack copies nothing. `lax.scan` would copy each map into the stack of its results, and out
of the stack of its inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


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


def write(x: jax.Array, into: Layer, interpret: bool = False) -> jax.Array:
    """Returns the stack with one layer replaced by x.

    An update in XLA would lay the whole stack out as what made x likes it, and copy it afterwards.
    """

    def kernel(at, source, _, target, done):
        copy = pltpu.make_async_copy(source, target.at[at[0]], done)
        copy.start()
        copy.wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(into.maps.shape, into.maps.dtype),
        input_output_aliases={2: 0},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * x.nbytes),
        interpret=interpret,
        name="stacked_write",
    )(places(into), x, into.maps)


def places(*layers: Layer) -> jax.Array:
    """Returns the numbers of layers, int32, for the index maps of a kernel."""
    return jnp.stack([jnp.asarray(each.at, jnp.int32) for each in layers])
