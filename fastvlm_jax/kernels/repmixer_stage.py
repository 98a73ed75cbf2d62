"""A stage of RepMixer blocks with frozen statistics as one function: the TPU kernels, with nothing else in its loops.

    block l    x_l -- depthwise 3x3 --> y -- depthwise 7x7 --> h -- fc1, GELU, fc2 --> + y = x_l+1

What the backward pass needs of a block lies in stacks, as stacked.py says. x is always kept; `keep` says what else is,
of "mixed" (y) and "depthwise" (h); the backward pass computes the others again.

Legend: L blocks, B images, H W rows and columns, C channels, F = 4 C hidden values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fastvlm_jax.kernels import depthwise_tpu, pointwise_block_tpu, stacked
from fastvlm_jax.kernels.stacked import Layer
from fastvlm_jax.sharding import batch_shards, device_cores, on_shards, sum_batch

Array = jax.Array


class Weights(NamedTuple):
    """Holds the weights of a block, or of all blocks of a stage with a first axis L.

    Attributes:
      mixer, mixer_bias: float32 [3, 3, 1, C] and [C].
      conv, conv_bias: float32 [7, 7, 1, C] and [C], BatchNorm applied to them.
      kernel1, bias1: [C, F] and [F] in the dtype of the maps.
      kernel2, bias2: [F, C] and [C] in the dtype of the maps, layer scale applied to them.
    """

    mixer: Array
    mixer_bias: Array
    conv: Array
    conv_bias: Array
    kernel1: Array
    bias1: Array
    kernel2: Array
    bias2: Array


def fits(x: jax.ShapeDtypeStruct, hidden: int) -> bool:
    """Returns whether the kernels take maps [B, H, W, C] of a whole batch with so many hidden values."""
    B, *size = x.shape
    shards, C = batch_shards(), x.shape[-1]
    here = (B // shards if B % shards == 0 else B, *size)
    kernels = (jax.ShapeDtypeStruct((k, k, 1, C), x.dtype) for k in (3, 7))
    return all(depthwise_tpu.fits(x, kernel) for kernel in kernels) and pointwise_block_tpu.pays(here, hidden, C)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def stage(x: Array, weights: Weights, keep: tuple[str, ...] = (), interpret: bool = False) -> Array:
    """Applies the blocks of a stage, one after another, each device for its own images.

    Only first derivatives are supported.

    Args:
      x: [B, H, W, C], bfloat16, which `fits`.
      weights: those of the blocks, with a first axis L.
      keep: see above.
      interpret: whether to run on any platform, slowly, for tests.

    Returns:
      [B, H, W, C] in x.dtype.
    """

    def local(x: Array, weights: Weights) -> Array:
        def block(x, w):
            y = depthwise_tpu.forward(x, w.mixer, w.mixer_bias, interpret=interpret)
            h = depthwise_tpu.forward(y, w.conv, w.conv_bias, interpret=interpret)
            return _pointwise(h, w, y, None, interpret), None

        return lax.scan(block, x, weights)[0]

    maps, _, whole = _axes(x, weights)
    return on_shards(local, (maps, whole), maps)(x, weights)


def _forward(x: Array, weights: Weights, keep: tuple[str, ...], interpret: bool):
    def local(x: Array, weights: Weights):
        L, like = len(weights.mixer), jax.ShapeDtypeStruct(x.shape, x.dtype)
        xs = stacked.new(like, L + 1).maps.at[0].set(x)
        kept = {name: stacked.new(like, L).maps for name in keep}

        def block(carry, at_and_weights):
            xs, kept = carry
            at, w = at_and_weights
            kept = dict(kept)

            def made(name, x, *weights):
                into = Layer(kept[name], at) if name in kept else None
                y = depthwise_tpu.forward(x, *weights, into, interpret)
                if into is None:
                    return y
                kept[name] = y
                return Layer(y, at)

            y = made("mixed", Layer(xs, at), w.mixer, w.mixer_bias)
            h = made("depthwise", y, w.conv, w.conv_bias)
            return (_pointwise(h, w, y, Layer(xs, at + 1), interpret), kept), None

        (xs, kept), _ = lax.scan(block, (xs, kept), (jnp.arange(L), weights))
        return xs[L], xs, kept

    maps, stacks, whole = _axes(x, weights)
    kept_axes = dict.fromkeys(keep, stacks)
    out, xs, kept = on_shards(local, (maps, whole), (maps, stacks, kept_axes))(x, weights)
    return out, (xs, kept, weights)


def _backward(keep: tuple[str, ...], interpret: bool, residuals, dout: Array):
    def local(xs: Array, kept: dict[str, Array], weights: Weights, dout: Array):
        def block(dout, at_and_weights):
            at, w = at_and_weights
            x = Layer(xs, at)

            def of(name, x, *weights):
                return (
                    Layer(kept[name], at) if name in kept else depthwise_tpu.forward(x, *weights, interpret=interpret)
                )

            y = of("mixed", x, w.mixer, w.mixer_bias)
            h = of("depthwise", y, w.conv, w.conv_bias)
            dh, *products = _pointwise_gradients(h, w, dout, interpret)
            dy, *conv = depthwise_tpu.backward(y, w.conv, dh, dout, interpret)
            dx, *mixer = depthwise_tpu.backward(x, w.mixer, dy, None, interpret)
            gradients = Weights(*mixer, *conv, *products)
            return dx, jax.tree.map(lambda gradient, like: gradient.astype(like.dtype), gradients, w)

        steps = (jnp.arange(len(weights.mixer)), weights)
        dx, gradients = lax.scan(block, dout, steps, reverse=True)
        return dx, jax.tree.map(sum_batch, gradients) if maps[0] else gradients

    xs, kept, weights = residuals
    maps, stacks, whole = _axes(dout, weights)
    in_axes = (stacks, dict.fromkeys(kept, stacks), whole, maps)
    return on_shards(local, in_axes, (maps, whole))(xs, kept, weights, dout)


stage.defvjp(_forward, _backward)


def _pointwise(h: Array | Layer, w: Weights, skip: Array | Layer, into: Layer | None, interpret: bool) -> Array:
    """Applies fc1, GELU and fc2 to h and adds `skip`: [B, H, W, C], or the stack of `into`."""
    like = stacked.shape(h)
    skip = skip.maps[skip.at] if isinstance(skip, Layer) else skip
    out = pointwise_block_tpu.forward(
        _positions(h), w.kernel1, w.bias1, w.kernel2, w.bias2, _positions(skip), into and _positions(into),
        exact=pointwise_block_tpu.exact(like.dtype), interpret=interpret,
    )  # fmt: skip
    return out.reshape(into.maps.shape if into else like.shape)


def _pointwise_gradients(h: Array | Layer, w: Weights, dout: Array, interpret: bool):
    """Returns the gradients of h [B, H, W, C], kernel1, bias1, kernel2 and bias2."""
    dh, *gradients = pointwise_block_tpu.backward(
        _positions(h), w.kernel1, w.bias1, w.kernel2, _positions(dout), interpret=interpret,
        exact=pointwise_block_tpu.exact(dout.dtype), cores=device_cores(),
    )  # fmt: skip
    return dh.reshape(dout.shape), *gradients


def _positions(x: Array | Layer) -> Array | Layer:
    """Returns maps [B, H, W, C] as [P, C]; of a layer, those of its stack."""
    if isinstance(x, Layer):
        return Layer(x.maps.reshape(len(x.maps), -1, x.maps.shape[-1]), x.at)
    return x.reshape(-1, x.shape[-1])


def _axes(x: Array, weights: Weights):
    """Returns the logical axes of maps, of stacks of them and of the weights; images that do not divide over the
    devices are computed whole by each."""
    maps = ("batch" if len(x) % batch_shards() == 0 else None, None, None, None)
    return maps, (None, *maps), jax.tree.map(lambda w: (None,) * w.ndim, weights)
