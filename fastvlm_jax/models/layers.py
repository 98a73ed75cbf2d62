"""Layers that the encoders share: convolution with BatchNorm, dense, GELU, squeeze-excite, drop path, layer scale.

Legend: B images, H W rows and columns, C channels. Images are channels-last.

`batch_stats` says whose statistics BatchNorm uses: see there. With those of images it updates the stored ones.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fastvlm_jax.kernels.batch_norm import EPSILON, Moments, moments, normalisation, weighted_sum
from fastvlm_jax.kernels.depthwise import depthwise_conv
from fastvlm_jax.models import lora
from fastvlm_jax.sharding import gathered

Array = jax.Array
torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default for convolutions


def conv(x_BHWC: Array, kernel: Array, stride: int, depthwise: bool, kernels: str = "auto") -> Array:
    """Convolves x with zero padding k//2 on all sides; kernel [k, k, C, F], or [k, k, 1, C*m] if depthwise.

    `kernels` says whether TPU kernels are used: see kernels/choice.py.
    """
    if kernel.shape == (1, 1, 1, x_BHWC.shape[-1]) and depthwise and stride == 1:
        return (x_BHWC.astype(jnp.float32) * kernel[0, 0, 0].astype(jnp.float32)).astype(x_BHWC.dtype)
    if depthwise:
        return depthwise_conv(x_BHWC, kernel, stride=stride, kernels=kernels)
    if kernel.shape[0] == 1 and stride == 1:
        return x_BHWC @ kernel[0, 0]
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_bias(y_BHWC: Array, bias: Array) -> Array:
    """Returns y + bias [C] in the dtype of y, which holds C channels or, for several pixels, multiples of them."""
    return y_BHWC + jnp.tile(bias.astype(y_BHWC.dtype), y_BHWC.shape[-1] // len(bias))


class Term(NamedTuple):
    """Holds a part of a sum: maps [B, H, W, C], times a factor, plus a shift, both float32 [B, C]."""

    maps: Array
    factor: Array
    shift: Array

    def times(self, scale_C: Array | float) -> "Term":
        return Term(self.maps, self.factor * scale_C, self.shift * scale_C)


def whole(x_BHWC: Array) -> Term:
    """Returns maps as they are, as a term."""
    ones = jnp.ones((len(x_BHWC), x_BHWC.shape[-1]))
    return Term(x_BHWC, ones, jnp.zeros_like(ones))


def added(terms: Sequence[Term], kernels: str) -> Array:
    """Returns the sum of terms in the dtype of their maps; those of the same maps read them once."""
    factors = {}
    for term in terms:
        maps, factor = factors.get(id(term.maps), (term.maps, 0.0))
        factors[id(term.maps)] = maps, factor + term.factor
    xs, sums = zip(*factors.values(), strict=True)
    return weighted_sum(xs, sums, sum(term.shift for term in terms), kernels)


def group_size(B: int, batch_stats: int) -> int:
    """Returns how many of B images share their statistics. `batch_stats`: see BatchNorm, but for 0.

    Raises:
      ValueError: the groups do not divide the batch.
    """
    images = batch_stats if batch_stats > 0 else B
    if B % images:
        raise ValueError(
            f"groups of {images} images for BatchNorm do not divide a batch of {B}: give a number that does, or -1 for "
            "the whole batch"
        )
    return images


class BatchNorm(nn.Module):
    """Applies BatchNorm as PyTorch does: momentum 0.1, stored variance unbiased, statistics in float32.

    Images with a False `mask_B` are left out of the statistics. With groups, each is normalised by its own statistics,
    as if it were the batch of a device of PyTorch's, and the stored ones move to the mean of the groups'. Groups that
    lie within the data shards of the mesh need no exchange between devices for it. A map with several pixels in the
    channels of a position (kernels/image_conv.py) has the parameters and statistics of the map itself.

    Attributes:
      batch_stats: images whose statistics are taken together; -1 takes those of the whole batch, which under `jax.jit`
        is the global one, and 0 the stored ones.
      kernels: whether TPU kernels are used, see kernels/choice.py.

    Raises:
      ValueError: the groups do not divide the batch.
    """

    batch_stats: int = 0
    momentum: float = 0.1
    kernels: str = "auto"

    def __call__(self, x_BHWC: Array, mask_B: Array | None = None, *, pixels: int = 1) -> Array:
        if self.batch_stats:
            return added([self.term(x_BHWC, moments(x_BHWC, self.kernels), mask_B, pixels=pixels)], self.kernels)
        factor, shift = (jnp.tile(value, pixels) for value in self.affine(x_BHWC.shape[-1] // pixels))
        return (x_BHWC.astype(jnp.float32) * factor + shift).astype(x_BHWC.dtype)

    def term(
        self, x_BHWC: Array, found: Moments, mask_B: Array | None = None, *, scale: Array | None = None, pixels: int = 1
    ) -> Term:
        """Returns the normalisation of x by statistics of images, and updates the stored ones.

        Args:
          found: moments of x.
          scale: float32 [C]; x times it is what is normalised.
          pixels: how many pixels of the map are in the channels of a position of x.
        """
        B = len(x_BHWC)
        images = B if self.is_initializing() else group_size(B, self.batch_stats)
        weight, bias, *stored = self._variables(x_BHWC.shape[-1] // pixels)
        found = normalisation(
            found, weight, bias, mask_B, images, math.prod(x_BHWC.shape[1:3]), scale=scale, pixels=pixels
        )
        if not self.is_initializing():
            for old, new in zip(stored, found.statistics, strict=True):
                old.value += self.momentum * found.filled * (new - old.value)
        return Term(x_BHWC, found.factor, found.shift)

    def affine(self, channels: int) -> tuple[Array, Array]:
        """Returns the normalisation with stored statistics as (factor, shift), each float32 [C]: x * factor + shift."""
        scale, bias, mean, var = self._variables(channels)
        factor = scale * jax.lax.rsqrt(var.value + EPSILON)
        return factor, bias - mean.value * factor

    @nn.compact
    def _variables(self, channels: int):
        return (
            self.param("scale", nn.initializers.ones, (channels,), jnp.float32),
            self.param("bias", nn.initializers.zeros, (channels,), jnp.float32),
            self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32),
        )


class ConvBN(nn.Module):
    """Applies a convolution without bias, then BatchNorm.

    A remat policy can save the result under the checkpoint name `keep`: the convolution's output with batch statistics,
    the normalised output with stored ones. `convolve(x, kernel)` takes the place of `conv`; its result may hold several
    pixels in the channels of a position.
    """

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    batch_stats: int = 0
    kernel_init: Callable = torch_conv_init
    keep: str = ""
    convolve: Callable[[Array, Array], Array] | None = None
    kernels: str = "auto"

    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        if self.batch_stats:
            return added([self.term(x_BHWC, None, mask_B)], self.kernels)
        kernel, norm = self._parts(x_BHWC.shape[-1])
        # Applied to the kernel, BatchNorm costs nothing and its scale's gradient needs no output of the convolution.
        factor, shift = norm.affine(self.features)
        y = with_bias(self._convolve(x_BHWC, gathered(kernel * factor, None, x_BHWC.dtype)), shift)
        return checkpoint_name(y, self.keep) if self.keep else y

    def term(self, x_BHWC: Array, found: Moments | None = None, mask_B: Array | None = None) -> Term:
        """Returns the result with statistics of images. `found`: moments of x, for a convolution that only scales x."""
        kernel, norm = self._parts(x_BHWC.shape[-1])
        kernel = gathered(kernel, None, x_BHWC.dtype)
        if found is not None and self.scales(x_BHWC.shape[-1]):
            return norm.term(x_BHWC, found, mask_B, scale=kernel[0, 0, 0].astype(jnp.float32))
        y = self._convolve(x_BHWC, kernel)
        y = checkpoint_name(y, self.keep) if self.keep else y
        return norm.term(y, moments(y, self.kernels), mask_B, pixels=y.shape[-1] // self.features)

    @nn.nowrap
    def scales(self, channels: int) -> bool:
        """Returns whether the convolution only scales the channels of its input."""
        return self.depthwise and self.kernel_size == self.stride == 1 and self.features == channels

    @nn.nowrap  # no name of its own in profiles
    def _convolve(self, x_BHWC: Array, kernel: Array) -> Array:
        if self.convolve:
            return self.convolve(x_BHWC, kernel)
        return conv(x_BHWC, kernel, self.stride, self.depthwise, self.kernels)

    @nn.compact
    def _parts(self, channels: int) -> tuple[Array, BatchNorm]:
        shape = (self.kernel_size, self.kernel_size, 1 if self.depthwise else channels, self.features)
        kernel = lora.adapted(self, self.param("kernel", self.kernel_init, shape, jnp.float32))
        return kernel, BatchNorm(self.batch_stats, kernels=self.kernels, name="bn")


class FoldedConv(nn.Module):
    """Applies a convolution with bias: the folded form of a multi-branch block. `convolve`: see ConvBN."""

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    convolve: Callable[[Array, Array], Array] | None = None
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        inputs = 1 if self.depthwise else x_BHWC.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", torch_conv_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = gathered(lora.adapted(self, kernel), None, x_BHWC.dtype)
        convolve = self.convolve or partial(conv, stride=self.stride, depthwise=self.depthwise, kernels=self.kernels)
        return with_bias(convolve(x_BHWC, kernel), bias)


class Dense(nn.Module):
    """Computes x @ kernel [C, F] + bias in the dtype of x, times `scale` [F] (float32) if it is given.

    `scale` multiplies the kernel and the bias. Its gradient is then a sum over the kernel's gradient, and the backward
    pass does not need the output of the matrix product. The kernel starts as `kernel_init` says; without it, from a
    truncated normal distribution of deviation `init_std`.
    """

    features: int
    use_bias: bool = True
    init_std: float = 0.02
    kernel_init: Callable | None = None
    bias_init: Callable = nn.initializers.zeros

    def __call__(self, x: Array, scale: Array | None = None) -> Array:
        kernel, bias = self._weights(x, scale, adapted=False)
        y = x @ kernel
        if (low_rank := lora.update(self, x)) is not None:
            y += low_rank if scale is None else low_rank * scale.astype(x.dtype)
        return y if bias is None else y + bias

    def weights(self, x: Array, scale: Array | None = None) -> tuple[Array, Array | None]:
        """Returns (kernel, bias or None), adapted and scaled, in the dtype of x; the values of x are not used."""
        return self._weights(x, scale, adapted=True)

    @nn.compact
    def _weights(self, x: Array, scale: Array | None, *, adapted: bool) -> tuple[Array, Array | None]:
        init = self.kernel_init or nn.initializers.truncated_normal(self.init_std)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        kernel = lora.adapted(self, kernel) if adapted else kernel
        kernel = gathered(kernel if scale is None else kernel * scale, None, x.dtype)
        if not self.use_bias:
            return kernel, None
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return kernel, (bias if scale is None else bias * scale).astype(x.dtype)


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate computed from the global means: 1x1 (C/reduction), ReLU, 1x1, sigmoid."""

    reduction: int = 16
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        C = x_BHWC.shape[-1]
        gate_BC = jnp.mean(x_BHWC, axis=(1, 2), dtype=jnp.float32).astype(x_BHWC.dtype)
        gate_BC = nn.relu(Dense(C // self.reduction, init_std=self.init_std, name="fc1")(gate_BC))
        gate_BC = nn.sigmoid(Dense(C, init_std=self.init_std, name="fc2")(gate_BC))
        return x_BHWC * gate_BC[:, None, None, :]


def drop_path(x_BHWC: Array, rate: Array, rng: Array | None) -> Array:
    """Zeros the residual branch of randomly chosen images and rescales the others; without `rng` returns x unchanged.

    Args:
      x_BHWC: output of the residual branch.
      rate: probability that an image's branch is dropped; the others are divided by 1 - rate.
    """
    if rng is None:
        return x_BHWC
    keep_B111 = jax.random.bernoulli(rng, 1 - rate, (x_BHWC.shape[0], 1, 1, 1))
    return jnp.where(keep_B111, x_BHWC / (1 - rate).astype(x_BHWC.dtype), 0)


def layer_scale(module: nn.Module, name: str, features: int, init: float) -> Array:
    """Returns the learned factor of a residual branch for each channel, float32 [features], a parameter of `module`."""
    return module.param(name, nn.initializers.constant(init), (features,), jnp.float32)
