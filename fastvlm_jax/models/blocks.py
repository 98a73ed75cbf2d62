"""Building blocks of the FastViT family, in training form ("branched") and released form ("folded").

Legend: B images, H W rows and columns, C channels, N positions (H*W). Images are channels-last.

    branched (training)                         folded (inference, after models/fold.py)
    MobileOne   BN(conv) + BN(1x1) + BN(x)      one convolution with bias
    RepMixer    x + ls * (MobileOne - BN(x))    one depthwise 3x3 that replaces x
    ConvFFN     BN(7x7) -> 1x1 -> GELU -> 1x1   the same: its BatchNorm stays, as in the released weights

BatchNorm uses batch statistics and updates the stored ones where `batch_stats=True`, and the stored ones otherwise.
Source: FastVLM (arXiv 2412.13303) section 3, FastViT (arXiv 2303.14189), MobileOne (arXiv 2206.04040).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fastvlm_jax.kernels.depthwise import depthwise_conv
from fastvlm_jax.sharding import gathered

Array = jax.Array
FORMS = ("branched", "folded")
BATCH_NORM_EPSILON = 1e-5
torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default for convolutions
small_init = nn.initializers.truncated_normal(0.02)
# Attention takes so few heads at a time that an image has at most as many scores, or one head: on TPU they then stay in
# on-chip memory, forward and backward (at 32x32 a third of the estimated cycles of all heads at once).
SCORES_AT_ONCE = 2**20


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU, x * (1 + erf(x / sqrt 2)) / 2, computed in float32 and returned in the dtype of x.

    By erf, as PyTorch does it: the erfc of `jax.nn.gelu` is two series and a choice, on TPU a pass of its own over x.
    Its backward pass keeps x alone. Differentiable once.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * (0.5 + 0.5 * jax.lax.erf(x32 * np.float32(0.5**0.5)))).astype(x.dtype)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x32 * x32) * np.float32((2 * np.pi) ** -0.5)
    slope = 0.5 + 0.5 * jax.lax.erf(x32 * np.float32(0.5**0.5)) + x32 * density
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def conv(x_BHWC: Array, kernel: Array, stride: int, depthwise: bool) -> Array:
    """Convolution with symmetric padding k//2; kernel [k, k, C, F], or [k, k, 1, C*m] if depthwise."""
    if kernel.shape == (1, 1, 1, x_BHWC.shape[-1]) and depthwise and stride == 1:
        return (x_BHWC.astype(jnp.float32) * kernel[0, 0, 0].astype(jnp.float32)).astype(x_BHWC.dtype)
    if depthwise:
        return depthwise_conv(x_BHWC, kernel, stride=stride)
    if kernel.shape[0] == 1 and stride == 1:
        return x_BHWC @ kernel[0, 0]
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class BatchNorm(nn.Module):
    """BatchNorm with PyTorch's semantics: momentum 0.1, unbiased variance stored, float32 statistics.

    Images whose `mask_B` is False count in no statistic. Under `jax.jit` the statistics are those of the global batch.
    """

    batch_stats: bool = False
    momentum: float = 0.1

    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        factor, shift = self.affine(x_BHWC, mask_B)
        return (x_BHWC.astype(jnp.float32) * factor + shift).astype(x_BHWC.dtype)

    @nn.compact
    def affine(self, x_BHWC: Array, mask_B: Array | None = None) -> tuple[Array, Array]:
        """The normalisation of x as (factor, shift), float32 [C]; by stored statistics, of x only C is read."""
        C = x_BHWC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, (C,), jnp.float32)
        stored_var = self.variable("batch_stats", "var", jnp.ones, (C,), jnp.float32)
        if self.batch_stats:
            x = x_BHWC.astype(jnp.float32)
            B, H, W, _ = x.shape
            weight = jnp.ones((B, 1, 1, 1)) if mask_B is None else mask_B.astype(jnp.float32)[:, None, None, None]
            count = checkpoint_name(jnp.sum(weight) * H * W, "statistics")
            mean = jnp.sum(x * weight, axis=(0, 1, 2)) / jnp.maximum(count, 1)
            mean = checkpoint_name(mean, "statistics")
            var = jnp.sum(jnp.square(x - mean) * weight, axis=(0, 1, 2)) / jnp.maximum(count, 1)
            var = checkpoint_name(var, "statistics")
            if not self.is_initializing():
                rate = self.momentum * (count > 0)
                unbiased = var * count / jnp.maximum(count - 1, 1)
                stored_mean.value += rate * (mean - stored_mean.value)
                stored_var.value += rate * (unbiased - stored_var.value)
        else:
            mean, var = stored_mean.value, stored_var.value
        factor = scale * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        return factor, bias - mean * factor


class ConvBN(nn.Module):
    """Convolution without bias, then BatchNorm. Remat policies may keep its result under the name `keep`."""

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    batch_stats: bool = False
    kernel_init: Callable = torch_conv_init
    keep: str = ""

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        inputs = 1 if self.depthwise else x_BHWC.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        norm, dtype = BatchNorm(self.batch_stats, name="bn"), x_BHWC.dtype
        if self.batch_stats:
            y = conv(x_BHWC, gathered(kernel, None, dtype), self.stride, self.depthwise)
            return norm(checkpoint_name(y, self.keep) if self.keep else y, mask_B)
        # On the kernel it costs nothing, and the gradient of its scale needs no result of the convolution.
        factor, shift = norm.affine(kernel)
        y = conv(x_BHWC, gathered(kernel * factor, None, dtype), self.stride, self.depthwise) + shift.astype(dtype)
        return checkpoint_name(y, self.keep) if self.keep else y


class FoldedConv(nn.Module):
    """Convolution with bias: what a multi-branch block becomes."""

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        inputs = 1 if self.depthwise else x_BHWC.shape[-1]
        shape = (self.kernel_size, self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", torch_conv_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = gathered(kernel, None, x_BHWC.dtype)
        return conv(x_BHWC, kernel, self.stride, self.depthwise) + bias.astype(x_BHWC.dtype)


class Dense(nn.Module):
    """x @ kernel [C, F] + bias, computed in the dtype of x.

    With `scale` [F], float32, the result times it. It multiplies kernel and bias, so that its gradient is a sum over
    the kernel's: the backward pass needs no result of the product.
    """

    features: int
    use_bias: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None) -> Array:
        init = nn.initializers.truncated_normal(self.init_std)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = x @ gathered(kernel if scale is None else kernel * scale, None, x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y += (bias if scale is None else bias * scale).astype(x.dtype)
        return y


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their global mean: 1x1 (C/reduction), ReLU, 1x1, sigmoid."""

    reduction: int = 16
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        C = x_BHWC.shape[-1]
        gate_BC = jnp.mean(x_BHWC, axis=(1, 2), dtype=jnp.float32).astype(x_BHWC.dtype)
        gate_BC = nn.relu(Dense(C // self.reduction, init_std=self.init_std, name="fc1")(gate_BC))
        gate_BC = nn.sigmoid(Dense(C, init_std=self.init_std, name="fc2")(gate_BC))
        return x_BHWC * gate_BC[:, None, None, :]


class MobileOne(nn.Module):
    """Convolution over-parameterised by BatchNormed branches that fold into one (MobileOne, Figure 3).

    The skip branch exists where input and output shapes agree, the 1x1 scale branch where the kernel is larger than 1.
    """

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    use_scale: bool = True
    use_se: bool = False
    activation: Callable[[Array], Array] | None = gelu
    form: str = "branched"
    batch_stats: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        size = dict(features=self.features, stride=self.stride, depthwise=self.depthwise)
        if self.form == "folded":
            y = FoldedConv(kernel_size=self.kernel_size, **size, name="folded")(x_BHWC)
        else:
            branch = dict(size, batch_stats=self.batch_stats)
            y = ConvBN(kernel_size=self.kernel_size, **branch, name="conv")(x_BHWC, mask_B)
            if self.use_scale and self.kernel_size > 1:
                y += ConvBN(kernel_size=1, **branch, name="scale")(x_BHWC, mask_B)
            if self.stride == 1 and x_BHWC.shape[-1] == self.features:
                y += BatchNorm(self.batch_stats, name="skip")(x_BHWC, mask_B)
        if self.use_se:
            y = SqueezeExcite(init_std=self.init_std, name="se")(y)
        return self.activation(y) if self.activation else y


class PatchEmbed(nn.Module):
    """Halves the grid: depthwise 7x7 stride 2 (+ 3x3 branch), [squeeze-excite], GELU, then MobileOne 1x1.

    `features` is a multiple of the input channels (twice them in every published size).
    """

    features: int
    use_se: bool = False
    form: str = "branched"
    batch_stats: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        size = dict(features=self.features, stride=2, depthwise=True)
        if self.form == "folded":
            y = FoldedConv(kernel_size=7, **size, name="folded")(x_BHWC)
        else:
            y = ConvBN(kernel_size=7, **size, batch_stats=self.batch_stats, name="large")(x_BHWC, mask_B)
            y += ConvBN(kernel_size=3, **size, batch_stats=self.batch_stats, name="small")(x_BHWC, mask_B)
        if self.use_se:
            y = SqueezeExcite(reduction=4, init_std=self.init_std, name="se")(y)
        pointwise = MobileOne(self.features, 1, form=self.form, batch_stats=self.batch_stats, name="pointwise")
        return pointwise(gelu(y), mask_B)


class ConditionalPositions(nn.Module):
    """Conditional positional encoding: x + depthwise 7x7 of x (arXiv 2102.10882); folded, the kernel holds the skip."""

    form: str = "branched"

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        C = x_BHWC.shape[-1]
        if self.form == "folded":
            return FoldedConv(C, 7, depthwise=True, name="folded")(x_BHWC)
        return x_BHWC + FoldedConv(C, 7, depthwise=True, name="conv")(x_BHWC)


def drop_path(x_BHWC: Array, rate: Array, rng: Array | None) -> Array:
    """Drops whole residual branches, an image at a time, and rescales the rest; without rng it does nothing."""
    if rng is None:
        return x_BHWC
    keep_B111 = jax.random.bernoulli(rng, 1 - rate, (x_BHWC.shape[0], 1, 1, 1))
    return jnp.where(keep_B111, x_BHWC / (1 - rate).astype(x_BHWC.dtype), 0)


class ConvFFN(nn.Module):
    """Depthwise 7x7 -> BatchNorm -> 1x1 (C * ratio) -> GELU -> 1x1, times `scale` [C]; no skip inside."""

    ratio: float = 4.0
    batch_stats: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array, scale: Array, mask_B: Array | None = None) -> Array:
        C = x_BHWC.shape[-1]
        conv7 = ConvBN(
            C, 7, depthwise=True, batch_stats=self.batch_stats, kernel_init=small_init, keep="depthwise", name="conv"
        )
        x = Dense(int(C * self.ratio), init_std=self.init_std, name="fc1")(conv7(x_BHWC, mask_B))
        return Dense(C, init_std=self.init_std, name="fc2")(gelu(x), scale)


class RepMixer(nn.Module):
    """Token mixer x + ls * (MobileOne 3x3 - BN(x)); folded, one depthwise 3x3 that replaces x."""

    layer_scale_init: float = 1e-5
    form: str = "branched"
    batch_stats: bool = False

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        C = x_BHWC.shape[-1]
        if self.form == "folded":
            return FoldedConv(C, 3, depthwise=True, name="folded")(x_BHWC)
        mixed = MobileOne(C, 3, depthwise=True, activation=None, batch_stats=self.batch_stats, name="mixer")
        mixed = mixed(x_BHWC, mask_B) - BatchNorm(self.batch_stats, name="norm")(x_BHWC, mask_B)
        scale = layer_scale(self, "layer_scale", C, self.layer_scale_init)
        return x_BHWC + scale.astype(x_BHWC.dtype) * mixed


def attend(q_BNhE: Array, k_BNhE: Array, v_BNhE: Array) -> Array:
    """softmax(q k / sqrt(E)) v over all positions, [B, N, h, E]; scores and softmax in float32."""
    scores_BhNN = jnp.einsum("bnhe,bmhe->bhnm", q_BNhE, k_BNhE, preferred_element_type=jnp.float32)
    weights_BhNN = jax.nn.softmax(scores_BhNN * q_BNhE.shape[-1] ** -0.5).astype(q_BNhE.dtype)
    return jnp.einsum("bhnm,bmhe->bnhe", weights_BhNN, v_BNhE)


class SelfAttention(nn.Module):
    """Multi-head attention over all positions of an image, times `scale` [C]; 32 channels a head, qkv without bias."""

    head_dim: int = 32
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array, scale: Array) -> Array:
        B, H, W, C = x_BHWC.shape
        N, heads = H * W, C // self.head_dim
        qkv = Dense(3 * C, use_bias=False, init_std=self.init_std, name="qkv")(x_BHWC.reshape(B, N, C))
        at_once = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * N * N <= SCORES_AT_ONCE))
        qkv = qkv.reshape(B, N, 3, heads // at_once, at_once, self.head_dim)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 1))  # each [groups of heads, B, N, heads of a group, head_dim]
        if at_once == heads:
            mixed = attend(q[0], k[0], v[0])
        else:
            step = jax.checkpoint(attend, prevent_cse=False)
            mixed = jnp.moveaxis(jax.lax.map(lambda qkv: step(*qkv), (q, k, v)), 0, 2)
        mixed = checkpoint_name(mixed.reshape(B, H, W, C), "attention")
        return Dense(C, init_std=self.init_std, name="proj")(mixed, scale)


def layer_scale(module: nn.Module, name: str, features: int, init: float) -> Array:
    """The learned per-channel factor [features] of a residual branch, float32."""
    return module.param(name, nn.initializers.constant(init), (features,), jnp.float32)


class Block(nn.Module):
    """One encoder block; RepMixerBlock or AttentionBlock by `mixer` ("repmixer" | "attention").

    repmixer:   x = RepMixer(x);                       x = x + ls * ConvFFN(x)
    attention:  x = x + ls1 * SelfAttention(norm(x));  x = x + ls2 * ConvFFN(x)     (no norm before the FFN)

    `attention_norm` is "layer" (over the channels of a position) or "batch".
    """

    mixer: str
    ratio: float = 4.0
    layer_scale_init: float = 1e-5
    attention_norm: str = "layer"
    form: str = "branched"
    batch_stats: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array, drop_rate: Array, mask_B: Array | None = None) -> Array:
        rng = self.make_rng("drop_path") if self.has_rng("drop_path") else None
        rng_mixer, rng_ffn = (None, None) if rng is None else jax.random.split(rng)
        C, init, x = x_BHWC.shape[-1], self.layer_scale_init, x_BHWC
        if self.mixer == "repmixer":
            x = RepMixer(init, self.form, self.batch_stats, name="mixer")(x, mask_B)
        else:
            if self.attention_norm == "batch":
                normed = BatchNorm(self.batch_stats, name="norm")(x, mask_B)
            else:
                normed = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=x.dtype, name="norm")(x)
            scale = layer_scale(self, "layer_scale_mixer", C, init)
            mixed = SelfAttention(init_std=self.init_std, name="mixer")(normed, scale)
            x = x + drop_path(mixed, drop_rate, rng_mixer)
        scale = layer_scale(self, "layer_scale_ffn", C, init)
        ffn = ConvFFN(self.ratio, self.batch_stats, self.init_std, name="ffn")(x, scale, mask_B)
        return x + drop_path(ffn, drop_rate, rng_ffn)
