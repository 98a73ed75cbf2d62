"""A stage of RepMixer blocks with frozen statistics as one function: the TPU kernels, with nothing else in its loops.

    block l    x_l -- depthwise 3x3 --> y -- depthwise 7x7 --> h -- fc1, GELU, fc2 --> + y = x_l+1

What the backward pass needs of a block lies in stacks, as stacked.py says. x is always kept; `keep` says what else is,
of "mixed" (y) and "depthwise" (h); the backward pass computes the others again.

Legend: L blocks, B images, H W rows and columns, C channels, F = 4 C hidden values.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fastvlm_jax.kernels import depthwise_tpu, pointwise_block_tpu, stacked
from fastvlm_jax.kernels.stacked import Layer
from fastvlm_jax.sharding import device_cores, images_here, map_axes, on_shards, sum_batch

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


class Prepared(NamedTuple):
    """Holds the weights of all blocks as the kernels take them, each a stack, or those of one block, each a Layer."""

    mixer: Array | Layer
    conv: Array | Layer
    kernel1: Array | Layer
    bias1: Array | Layer
    kernel2: Array | Layer
    bias2: Array | Layer
    kernel2_CF: Array | Layer
    kernel1_FC: Array | Layer

    def of(self, at: Array | int) -> "Prepared":
        """Returns the weights of one block."""
        return Prepared(*[Layer(stack, at) for stack in self])


class Sums(NamedTuple):
    """Holds the sums that make the weights' gradients, stacks of all blocks, or the layers of one block.

    Attributes:
      mixer, conv: see `depthwise_tpu.backward`.
      products: see `pointwise_block_tpu.backward`.
    """

    mixer: Array | Layer
    conv: Array | Layer
    products: Sequence[Array | Layer]

    def of(self, at: Array | int) -> "Sums":
        """Returns the layers of one block."""
        return Sums(Layer(self.mixer, at), Layer(self.conv, at), [Layer(stack, at) for stack in self.products])

    def gradients(self) -> Weights:
        """Returns the gradients of the weights of all blocks, float32."""
        mixer, conv = (depthwise_tpu.kernel_and_bias(jnp.sum(stack, axis=1)) for stack in (self.mixer, self.conv))
        return Weights(*mixer, *conv, *pointwise_block_tpu.gradients(self.products))


def fits(x: jax.ShapeDtypeStruct, hidden: int) -> bool:
    """Returns whether the kernels take maps [B, H, W, C] of a whole batch with so many hidden values."""
    C, here = x.shape[-1], (images_here(len(x)), *x.shape[1:])
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
        prepared = prepared_weights(weights)

        def block(at, x):
            w = prepared.of(at)
            y = depthwise_tpu.forward(x, w.mixer, None, interpret)
            h = depthwise_tpu.forward(y, w.conv, None, interpret)
            return pointwise(h, w, y, None, interpret)

        return lax.fori_loop(0, len(weights.mixer), block, x)

    maps, _, whole = _axes(x, weights)
    return on_shards(local, (maps, whole), maps)(x, weights)


def _forward(x: Array, weights: Weights, keep: tuple[str, ...], interpret: bool):
    def local(x: Array, weights: Weights):
        L, like, prepared = len(weights.mixer), jax.ShapeDtypeStruct(x.shape, x.dtype), prepared_weights(weights)
        xs = stacked.write(x, stacked.new(like, L), interpret)
        kept = {name: stacked.new(like, L).maps for name in keep}

        def block(at, carry, *, last=False):
            xs, kept = carry
            kept, w = dict(kept), prepared.of(at)

            def made(name, x, taps):
                into = Layer(kept[name], at) if name in kept else None
                y = depthwise_tpu.forward(x, taps, into, interpret)
                if into is None:
                    return y
                kept[name] = y
                return Layer(y, at)

            y = made("mixed", Layer(xs, at), w.mixer)
            h = made("depthwise", y, w.conv)
            if last:
                return pointwise(h, w, y, None, interpret), kept
            return pointwise(h, w, y, Layer(xs, at + 1), interpret), kept

        xs, kept = lax.fori_loop(0, L - 1, block, (xs, kept))
        out, kept = block(L - 1, (xs, kept), last=True)
        return out, xs, kept

    maps, stacks, whole = _axes(x, weights)
    kept_axes = dict.fromkeys(keep, stacks)
    out, xs, kept = on_shards(local, (maps, whole), (maps, stacks, kept_axes))(x, weights)
    return out, (xs, kept, weights)


def _backward(keep: tuple[str, ...], interpret: bool, residuals, dout: Array):
    def local(xs: Array, kept: dict[str, Array], weights: Weights, dout: Array):
        L, prepared = len(weights.mixer), prepared_weights(weights)
        sums = new_sums(dout, prepared)

        def block(i, carry):
            dout, sums = carry
            at = L - 1 - i
            x, w, into = Layer(xs, at), prepared.of(at), sums.of(at)

            def of(name, x, taps):
                return Layer(kept[name], at) if name in kept else depthwise_tpu.forward(x, taps, None, interpret)

            y = of("mixed", x, w.mixer)
            h = of("depthwise", y, w.conv)
            dh, products = pointwise_gradients(h, w, dout, into.products, interpret)
            dy, conv = depthwise_tpu.backward(y, w.conv, dh, dout, into.conv, interpret)
            dx, mixer = depthwise_tpu.backward(x, w.mixer, dy, None, into.mixer, interpret)
            return dx, Sums(mixer, conv, products)

        dx, sums = lax.fori_loop(0, L, block, (dout, sums))
        gradients = jax.tree.map(lambda gradient, w: gradient.astype(w.dtype), sums.gradients(), weights)
        return dx, jax.tree.map(sum_batch, gradients) if maps[0] else gradients

    xs, kept, weights = residuals
    maps, stacks, whole = _axes(dout, weights)
    in_axes = (stacks, dict.fromkeys(kept, stacks), whole, maps)
    return on_shards(local, in_axes, (maps, whole))(xs, kept, weights, dout)


stage.defvjp(_forward, _backward)


def prepared_weights(w: Weights) -> Prepared:
    """Returns the weights of all blocks as the kernels take them."""
    return Prepared(
        depthwise_tpu.taps(w.mixer, w.mixer_bias),
        depthwise_tpu.taps(w.conv, w.conv_bias),
        w.kernel1,
        pointwise_block_tpu.row(w.bias1),
        w.kernel2,
        pointwise_block_tpu.row(w.bias2),
        jnp.swapaxes(w.kernel2, 1, 2),
        jnp.swapaxes(w.kernel1, 1, 2),
    )


def new_sums(x: Array, w: Prepared) -> Sums:
    """Returns new stacks for the sums of all blocks with maps like x [B, H, W, C]."""
    L, C, F = w.kernel1.shape

    def new(*shape):
        return stacked.new(jax.ShapeDtypeStruct(shape, jnp.float32), L).maps

    products = pointwise_block_tpu.sums(x.size // C, C, F, C, x.dtype, device_cores())
    taps = (new(len(x), stack.shape[1], C) for stack in (w.mixer, w.conv))
    return Sums(*taps, tuple(new(*each.shape) for each in products))


def pointwise(h: Array | Layer, w: Prepared, skip: Array | Layer, into: Layer | None, interpret: bool) -> Array:
    """Applies fc1, GELU and fc2 to h and adds `skip`: [B, H, W, C], or the stack of `into`."""
    like = stacked.shape(h)
    out = pointwise_block_tpu.forward(
        _positions(h), w.kernel1, w.bias1, w.kernel2, w.bias2, _positions(skip), into and _positions(into),
        exact=pointwise_block_tpu.exact(like.dtype), interpret=interpret,
    )  # fmt: skip
    return out.reshape(into.maps.shape if into else like.shape)


def pointwise_gradients(h: Array | Layer, w: Prepared, dout: Array, into: Sequence[Layer], interpret: bool):
    """Returns the gradient of h [B, H, W, C], and the stacks of sums."""
    dh, sums = pointwise_block_tpu.backward(
        _positions(h), w.kernel1, w.bias1, w.kernel2_CF, w.kernel1_FC, _positions(dout), into,
        exact=pointwise_block_tpu.exact(dout.dtype), cores=device_cores(), interpret=interpret,
    )  # fmt: skip
    return dh.reshape(dout.shape), sums


def _positions(x: Array | Layer) -> Array | Layer:
    """Returns maps [B, H, W, C] as [P, C]; of a layer, those of its stack."""
    if isinstance(x, Layer):
        return Layer(x.maps.reshape(len(x.maps), -1, x.maps.shape[-1]), x.at)
    return x.reshape(-1, x.shape[-1])


def _axes(x: Array, weights: Weights):
    """Returns the logical axes of maps, of stacks of them and of the weights."""
    maps = map_axes(len(x))
    return maps, (None, *maps), jax.tree.map(lambda w: (None,) * w.ndim, weights)
