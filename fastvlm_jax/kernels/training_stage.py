"""A stage of RepMixer blocks with statistics of images as one function: the TPU kernels in its loops, in few passes.

    block l    x_l -- depthwise 3x3 --> c
               x_l, c -- factors by their moments --> y -- depthwise 7x7 --> h0
               h0 -- factors by its moments --> h -- fc1, GELU, fc2 --> + y = x_l+1

Every branch of a RepMixer but the 3x3 convolution scales x, so y = p x + q c + r with factors of each image's group.
What the backward pass needs of a block lies in stacks, as stacked.py says: always x, and h0 if `keep` names
"depthwise". It computes the others again, but never the moments.

Legend: L blocks, B images, H W rows and columns, C channels.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fastvlm_jax.kernels import batch_norm_tpu, depthwise_tpu, repmixer_stage, stacked
from fastvlm_jax.kernels.batch_norm import Moments, moments_slope, normalisation
from fastvlm_jax.kernels.repmixer_stage import Prepared, Sums, Weights, prepared_weights
from fastvlm_jax.kernels.stacked import Layer
from fastvlm_jax.sharding import map_axes, on_shards

Array = jax.Array
Affine = tuple[Array, Array]  # weight and bias of a BatchNorm, float32 [C]


class Norms(NamedTuple):
    """Holds what makes the factors of a block, or of all blocks with a first axis L; all float32.

    Attributes:
      scale: kernel of the 1x1 branch, [C].
      layer_scale: of the RepMixer, [C].
      of_mixer, of_scale, of_skip, of_norm, of_conv: BatchNorm of the 3x3, the 1x1 and the skip branch, the one that is
        subtracted, and that of the 7x7.
    """

    scale: Array
    layer_scale: Array
    of_mixer: Affine
    of_scale: Affine
    of_skip: Affine
    of_norm: Affine
    of_conv: Affine


class Statistics(NamedTuple):
    """Holds mean and unbiased variance [C] for each BatchNorm of a block, or of all blocks with a first axis L."""

    of_mixer: tuple[Array, Array]
    of_scale: tuple[Array, Array]
    of_skip: tuple[Array, Array]
    of_norm: tuple[Array, Array]
    of_conv: tuple[Array, Array]


def fits(x: jax.ShapeDtypeStruct, hidden: int) -> bool:
    """Returns whether the kernels take maps [B, H, W, C] of a whole batch with so many hidden values."""
    return batch_norm_tpu.fits(x) and repmixer_stage.fits(x, hidden)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def stage(
    x: Array, weights: Weights, norms: Norms, mask: Array,
    images: int, keep: tuple[str, ...] = (), interpret: bool = False,
) -> tuple[Array, Statistics, Array]:  # fmt: skip
    """Applies the blocks of a stage, one after another.

    Only first derivatives are supported.

    Args:
      x: [B, H, W, C], bfloat16, which `fits`.
      weights: those of the blocks, with a first axis L; biases of the convolutions are 0.
      norms: with a first axis L.
      mask: float32 [B], 1 for images that count in the statistics and 0 for others.
      images: images whose statistics are taken together, a divisor of B.
      keep: see above.
      interpret: whether to run on any platform, slowly, for tests.

    Returns:
      ([B, H, W, C] in x.dtype, statistics with a first axis L, whether any image counts).
    """
    return _forward(x, weights, norms, mask, images, keep, interpret)[0]


def _forward(x, weights: Weights, norms: Norms, mask, images: int, keep: tuple[str, ...], interpret: bool):
    L, run, prepared = len(weights.mixer), partial(_run, len(x), interpret), prepared_weights(weights)
    positions, keeps = x.shape[1] * x.shape[2], "depthwise" in keep

    def stacks(x, interpret):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return stacked.write(x, stacked.new(like, L + 1), interpret), *[stacked.new(like, L).maps] * keeps

    def block(carry, inputs):
        (xs, *hs), (at, norms) = carry, inputs
        x, w = Layer(xs, at), prepared.of(at)
        c = run(depthwise_tpu.forward, "maps", [x], [], [w.mixer])
        found_x, found_c = (run(batch_norm_tpu.moments, "moments", [maps]) for maps in (x, c))
        factors, mixer_statistics, filled = _mixer_factors(norms, found_x, found_c, mask, images, positions)
        y = run(_weighted, "maps", [x, c], factors)
        if keeps:
            hs = [run(_convolved_into, "stack", [y, Layer(*hs, at)], [], [w.conv])]
            h0 = Layer(*hs, at)
        else:
            h0 = run(depthwise_tpu.forward, "maps", [y], [], [w.conv])
        found_h = run(batch_norm_tpu.moments, "moments", [h0])
        factors, conv_statistics = _conv_factors(norms, found_h, mask, images, positions)
        h = run(_weighted, "maps", [h0], factors)
        xs = run(_pointwise_into, "stack", [h, y, Layer(xs, at + 1)], [], [w])
        statistics = Statistics(*mixer_statistics, conv_statistics)
        return (xs, *hs), ((found_x, found_c, found_h), statistics, filled)

    first = run(stacks, ("stack",) * (1 + keeps), [x])
    (xs, *hs), (found, statistics, filled) = lax.scan(block, first, (jnp.arange(L), norms))
    return (xs[L], statistics, filled[0]), (xs, hs, found, weights, norms, mask)


def _backward(images: int, keep: tuple[str, ...], interpret: bool, residuals, gradients):
    (xs, hs, found, weights, norms, mask), (dout, *_) = residuals, gradients
    L, run, prepared = len(weights.mixer), partial(_run, len(dout), interpret), prepared_weights(weights)
    positions = dout.shape[1] * dout.shape[2]

    def mixer_factors(*args):
        return _mixer_factors(*args, mask, images, positions)[0]

    def conv_factors(*args):
        return _conv_factors(*args, mask, images, positions)[0]

    def block(dout, inputs):
        at, norms, (found_x, found_c, found_h) = inputs
        x, w = Layer(xs, at), prepared.of(at)
        c = run(depthwise_tpu.forward, "maps", [x], [], [w.mixer])
        (p, q, r), mixer_vjp = jax.vjp(mixer_factors, norms, found_x, found_c)
        y = run(_weighted, "maps", [x, c], [p, q, r])
        h0 = Layer(*hs, at) if hs else run(depthwise_tpu.forward, "maps", [y], [], [w.conv])
        (factor, shift), conv_vjp = jax.vjp(conv_factors, norms, found_h)
        h = run(_weighted, "maps", [h0], [factor, shift])

        dh, products = run(_pointwise_gradients, ("maps", ("parts",) * 4), [h, dout], [], [w])
        of_conv, dfound_h = conv_vjp(_factor_gradients(run, [h0], dh))
        dh0 = run(_weighted, "maps", [dh, h0], [factor, *moments_slope(found_h[0], dfound_h, positions)])
        dy, conv = run(_conv_gradients, ("maps", "taps"), [y, dh0, dout], [], [w.conv])
        of_mixer, dfound_x, dfound_c = mixer_vjp(_factor_gradients(run, [x, c], dy))
        dc = run(_weighted, "maps", [dy, c], [q, *moments_slope(found_c[0], dfound_c, positions)])
        others = run(_weighted, "maps", [dy, x], [p, *moments_slope(found_x[0], dfound_x, positions)])
        dx, mixer = run(_conv_gradients, ("maps", "taps"), [x, dc, others], [], [w.mixer])
        return dx, (Sums(mixer, conv, products), jax.tree.map(jnp.add, of_conv, of_mixer))

    dx, (sums, dnorms) = lax.scan(block, dout, (jnp.arange(L), norms, found), reverse=True)
    dweights = jax.tree.map(lambda gradient, w: gradient.astype(w.dtype), sums.gradients(), weights)
    return dx, dweights, dnorms, jnp.zeros_like(mask)


stage.defvjp(_forward, _backward)


def _mixer_factors(norms: Norms, found_x: Moments, found_c: Moments, mask: Array, images: int, positions: int):
    """Returns (factors of x and c, and the shift), the statistics of the four BatchNorms, and whether any image counts.

    y = x + layer_scale * (norm(c) + norm(scale * x) + norm(x) - norm(x)), each with a BatchNorm of its own.
    """
    normalise = partial(normalisation, mask_B=mask, images=images, positions=positions)
    mixer, skip, norm = (
        normalise(found, *affine)
        for found, affine in ((found_c, norms.of_mixer), (found_x, norms.of_skip), (found_x, norms.of_norm))
    )
    scale = normalise(found_x, *norms.of_scale, scale=norms.scale)
    p = 1 + norms.layer_scale * (scale.factor + skip.factor - norm.factor)
    q = norms.layer_scale * mixer.factor
    r = norms.layer_scale * (mixer.shift + scale.shift + skip.shift - norm.shift)
    return (p, q, r), [each.statistics for each in (mixer, scale, skip, norm)], mixer.filled


def _conv_factors(norms: Norms, found: Moments, mask: Array, images: int, positions: int):
    """Returns (factor and shift of the 7x7 convolution, its statistics)."""
    conv = normalisation(found, *norms.of_conv, mask, images, positions)
    return (conv.factor, conv.shift), conv.statistics


def _factor_gradients(run, xs, dy: Array) -> tuple[Array, ...]:
    """Returns the gradients of the factors of xs and of the shift, from that of their weighted sum."""
    found = run(_products, "sums", [*xs, dy])
    return tuple(found[:, i] for i in range(len(xs) + 1))


# What a device does with its own images: arguments as `_run` passes them.


def _weighted(*args, interpret: bool) -> Array:
    n = len(args) // 2  # maps, then as many factors and a shift
    return batch_norm_tpu.weighted_sum(args[:n], args[n:-1], args[-1], interpret)


def _products(*maps, interpret: bool) -> Array:
    return batch_norm_tpu.products(maps[:-1], maps[-1], interpret)


def _convolved_into(x, into: Layer, taps: Layer, interpret: bool) -> Array:
    return depthwise_tpu.forward(x, taps, into, interpret)


def _conv_gradients(x, dy: Array, plus: Array, taps: Layer, interpret: bool) -> tuple[Array, Array]:
    return depthwise_tpu.backward(x, taps, dy, plus, interpret=interpret)


def _pointwise_into(h: Array, skip: Array, into: Layer, w: Prepared, interpret: bool) -> Array:
    return repmixer_stage.pointwise(h, w, skip, into, interpret)


def _pointwise_gradients(h: Array, dout: Array, w: Prepared, interpret: bool):
    return repmixer_stage.pointwise_gradients(h, w, dout, None, interpret)


def _run(images: int, interpret: bool, function, out, maps, rows=(), weights=()):
    """Returns function(*maps, *rows, *weights) of each device's images.

    Args:
      images: images of the whole batch.
      out: what it returns, or a tuple of such: "maps", a "stack" of them, "moments", "sums" of rows, "taps" of each
        image, or "parts" that are to be added up.
      maps: arrays [B, H, W, C], or layers of stacks.
      rows: arrays [B, C].
      weights: arrays or layers, or trees of them; whole on every device.
    """
    axes = map_axes(images)
    row, stack = axes[:2], (None, *axes)
    kinds = {"maps": axes, "stack": stack, "moments": (row, row), "sums": axes[:3], "taps": axes[:3], "parts": axes[:3]}
    of_maps = [Layer(stack, ()) if isinstance(x, Layer) else axes for x in maps]
    whole = jax.tree.map(lambda w: (None,) * jnp.ndim(w), list(weights))
    run = on_shards(
        partial(function, interpret=interpret), [*of_maps, *[row] * len(rows), *whole], jax.tree.map(kinds.get, out)
    )
    return run(*maps, *rows, *weights)
