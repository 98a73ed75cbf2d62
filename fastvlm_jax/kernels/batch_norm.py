"""The two functions that make BatchNorm with statistics of images: moments of maps, and weighted sums of maps.

    moments       x -> mean and variance of each image, which are merged to those of a group of images outside
    weighted_sum  x1, x2, ... -> factor1 * x1 + factor2 * x2 + ... + shift

Normalising is a weighted sum of one map; a sum of normalised branches is one of several, and a branch that only scales
its input adds to that input's factor. Both have gradients written by hand: the one of `moments` is a weighted sum
again, and that of `weighted_sum` needs sums over positions, for which TPUs have kernels (batch_norm_tpu.py).

Legend: B images, H W rows and columns, C channels.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fastvlm_jax.kernels import batch_norm_tpu, choice
from fastvlm_jax.sharding import map_axes, on_shards

Array = jax.Array
Moments = tuple[Array, Array]  # mean and biased variance of each image, float32 [B, C]
EPSILON = 1e-5  # that is added to variances


def moments_slope(mean: Array, gradients: Moments, positions: int) -> tuple[Array, Array]:
    """Returns (factor, shift) [B, C]: x * factor + shift is the gradient of x, made from those of its moments."""
    dmean, dvar = (gradient / positions for gradient in gradients)
    return 2 * dvar, dmean - 2 * dvar * mean


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def moments(x: Array, kernels: str = "auto") -> Moments:
    """Returns the mean and the biased variance of each channel over the positions of each image, float32 [B, C].

    A remat policy can save both under the checkpoint name "statistics". Only first derivatives are supported.

    Args:
      x: maps [B, H, W, C], float32 or bfloat16.
      kernels: whether TPU kernels are used, see choice.py.
    """
    if choice.used(kernels) and batch_norm_tpu.fits(x):
        maps = map_axes(len(x))
        found = on_shards(partial(batch_norm_tpu.moments, interpret=kernels == "interpret"), (maps,), (maps[:2],) * 2)
        return found(x)
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=(1, 2))
    return mean, jnp.mean(jnp.square(x - _everywhere(mean)), axis=(1, 2))


def _moments_forward(x: Array, kernels: str):
    mean, var = (checkpoint_name(found, "statistics") for found in moments(x, kernels))
    return (mean, var), (x, mean)


def _moments_backward(kernels: str, residuals, gradients: Moments):
    x, mean = residuals
    factor, shift = moments_slope(mean, gradients, x.shape[1] * x.shape[2])
    return (_sum((x,), (factor,), shift),)


moments.defvjp(_moments_forward, _moments_backward)


class Normalisation(NamedTuple):
    """Holds what BatchNorm does with maps.

    Attributes:
      factor, shift: float32 [B, C] of each image: x * factor + shift.
      statistics: mean and unbiased variance, float32 [C], the mean of those of the groups that have images.
      filled: whether any group has.
    """

    factor: Array
    shift: Array
    statistics: tuple[Array, Array]
    filled: Array


def normalisation(
    found: Moments, weight: Array, bias: Array, mask_B: Array | None, images: int, positions: int,
    *, scale: Array | None = None, pixels: int = 1,
) -> Normalisation:  # fmt: skip
    """Merges the moments of images to those of groups, and returns the normalisation by them.

    Args:
      found: moments of the images.
      weight, bias: learned parameters, float32 [C].
      mask_B: images that count; None for all.
      images: how many images are a group; all if there are not as many.
      positions: positions of an image.
      scale: float32 [C]; maps times it are what is normalised, and the factor is that of the maps.
      pixels: how many pixels of the map are in the channels of a position, whose number is C * pixels then.
    """
    B, channels, scale = len(found[0]), len(weight), 1.0 if scale is None else scale
    weight_GN = (jnp.ones(B) if mask_B is None else mask_B.astype(jnp.float32)).reshape(max(B // images, 1), -1)
    mean_GNpC, var_GNpC = (
        value.reshape(*weight_GN.shape, pixels, channels) * factor
        for value, factor in zip(found, (scale, jnp.square(scale)), strict=True)
    )
    pixels_G = jnp.sum(weight_GN, axis=1) * pixels
    share_GNpC = (weight_GN / jnp.maximum(pixels_G, 1)[:, None])[:, :, None, None]
    mean_GC = jnp.sum(share_GNpC * mean_GNpC, axis=(1, 2))
    spread_GNpC = jnp.square(mean_GNpC - mean_GC[:, None, None])
    var_GC = jnp.sum(share_GNpC * (var_GNpC + spread_GNpC), axis=(1, 2))
    factor_GC = weight * jax.lax.rsqrt(var_GC + EPSILON)

    count_G1 = (pixels_G * positions)[:, None]
    filled_G1 = count_G1 > 0
    share_G1 = filled_G1 / jnp.maximum(jnp.sum(filled_G1), 1)
    unbiased_GC = var_GC * count_G1 / jnp.maximum(count_G1 - 1, 1)
    statistics = tuple(jnp.sum(share_G1 * value_GC, axis=0) for value_GC in (mean_GC, unbiased_GC))

    def of_images(value_GC: Array) -> Array:
        return jnp.broadcast_to(value_GC[:, None, None], mean_GNpC.shape).reshape(B, -1)

    factor, shift = of_images(factor_GC * scale), of_images(bias - mean_GC * factor_GC)
    return Normalisation(factor, shift, statistics, jnp.any(filled_G1))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def weighted_sum(xs: tuple[Array, ...], factors: tuple[Array, ...], shift: Array, kernels: str = "auto") -> Array:
    """Returns the sum of maps, each times its factor, and a shift.

    Only first derivatives are supported.

    Args:
      xs: maps [B, H, W, C], all float32 or all bfloat16.
      factors: as many, float32 [B, C].
      shift: float32 [B, C].
      kernels: as in `moments`.

    Returns:
      [B, H, W, C] in the dtype of the maps, summed in float32.
    """
    return _sum(xs, factors, shift)


def _sum_forward(xs, factors, shift, kernels: str):
    return _sum(xs, factors, shift), (xs, factors)


def _sum_backward(kernels: str, residuals, dy: Array):
    xs, factors = residuals
    if choice.used(kernels) and batch_norm_tpu.fits(dy):
        maps = map_axes(len(dy))
        products = partial(batch_norm_tpu.products, interpret=kernels == "interpret")
        found_BSC = on_shards(products, ((maps,) * len(xs), maps), maps[:3])(xs, dy)
        sums = [found_BSC[:, i] for i in range(len(xs) + 1)]
    else:
        dy32 = dy.astype(jnp.float32)
        sums = [jnp.sum(x.astype(jnp.float32) * dy32, axis=(1, 2)) for x in xs] + [jnp.sum(dy32, axis=(1, 2))]
    dxs = tuple((dy.astype(jnp.float32) * _everywhere(factor)).astype(dy.dtype) for factor in factors)
    return dxs, tuple(sums[:-1]), sums[-1]


weighted_sum.defvjp(_sum_forward, _sum_backward)


def _sum(xs, factors, shift) -> Array:
    total = sum(x.astype(jnp.float32) * _everywhere(factor) for x, factor in zip(xs, factors, strict=True))
    return (total + _everywhere(shift)).astype(xs[0].dtype)


def _everywhere(x_BC: Array) -> Array:
    """Returns values of images and channels as maps [B, 1, 1, C]."""
    return x_BC[:, None, None]
