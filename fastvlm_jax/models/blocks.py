"""Building blocks of the FastViT family in training form ("branched") and released form ("folded").

Legend: B images, H W rows and columns, C channels, N positions (H*W). Images are channels-last.

    branched (training)                         folded (inference, after models/fold.py)
    MobileOne   BN(conv) + BN(1x1) + BN(x)      one convolution with bias
    RepMixer    x + ls * (MobileOne - BN(x))    one depthwise 3x3, the skip included
    ConvFFN     BN(7x7) -> 1x1 -> GELU -> 1x1   the same: its BatchNorm stays, as in the released weights

Source: FastVLM (arXiv 2412.13303) section 3, FastViT (arXiv 2303.14189), MobileOne (arXiv 2206.04040).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from fastvlm_jax.kernels.batch_norm import moments
from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.kernels.mlp import mlp
from fastvlm_jax.kernels.self_attention import self_attention
from fastvlm_jax.models.layers import (
    BatchNorm,
    ConvBN,
    Dense,
    FoldedConv,
    Moments,
    SqueezeExcite,
    Term,
    added,
    drop_path,
    layer_scale,
    whole,
)

Array = jax.Array
FORMS = ("branched", "folded")
HEAD_DIM = 32  # channels of a head of self-attention in every published size
small_init = nn.initializers.truncated_normal(0.02)


class MobileOne(nn.Module):
    """Applies a sum of convolution branches with BatchNorm, which fold into one convolution (MobileOne, Figure 3).

    There is a skip branch if the input and output shapes agree, and with `use_scale` a 1x1 branch if the kernel is
    larger than 1. Squeeze-excite (`use_se`) and `activation` follow the sum. `convolve`: see ConvBN.
    """

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    use_scale: bool = True
    use_se: bool = False
    activation: Callable[[Array], Array] | None = gelu
    form: str = "branched"
    batch_stats: int = 0
    init_std: float = 0.02
    convolve: Callable[[Array, Array], Array] | None = None
    kernels: str = "auto"

    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        branches, squeeze_excite = self._parts(x_BHWC.shape[-1])
        if self.batch_stats and self.form == "branched":
            y = added(self._terms(branches, x_BHWC, None, mask_B), self.kernels)
        else:
            y, *others = (branch(x_BHWC) for branch in branches.values())
            y = sum(others, start=y)
        y = squeeze_excite(y) if squeeze_excite else y
        return self.activation(y) if self.activation else y

    def terms(self, x_BHWC: Array, found: Moments, mask_B: Array | None) -> list[Term]:
        """Returns the branches with statistics of images, before squeeze-excite. `found`: moments of x."""
        return self._terms(self._parts(x_BHWC.shape[-1])[0], x_BHWC, found, mask_B)

    @nn.nowrap
    def _terms(self, branches: dict[str, nn.Module], x_BHWC, found: Moments | None, mask_B) -> list[Term]:
        if found is None and "skip" in branches:
            found = moments(x_BHWC, self.kernels)
        return [branch.term(x_BHWC, found, mask_B) for branch in branches.values()]

    @nn.compact
    def _parts(self, channels: int) -> tuple[dict[str, nn.Module], nn.Module | None]:
        """Returns the branches by name, and squeeze-excite."""
        size = dict(features=self.features, stride=self.stride, depthwise=self.depthwise)
        size |= dict(convolve=self.convolve, kernels=self.kernels)
        if self.form == "folded":
            branches = {"folded": FoldedConv(kernel_size=self.kernel_size, **size, name="folded")}
        else:
            size["batch_stats"] = self.batch_stats
            branches = {"conv": ConvBN(kernel_size=self.kernel_size, **size, name="conv")}
            if self.use_scale and self.kernel_size > 1:
                branches["scale"] = ConvBN(kernel_size=1, **size, name="scale")
            if self.stride == 1 and channels == self.features:
                branches["skip"] = BatchNorm(self.batch_stats, kernels=self.kernels, name="skip")
        return branches, SqueezeExcite(init_std=self.init_std, name="se") if self.use_se else None


class PatchEmbed(nn.Module):
    """Halves the grid: depthwise 7x7 stride 2 (+ 3x3 branch), [squeeze-excite], GELU, then MobileOne 1x1.

    `features` must be a multiple of the number of input channels; in every published size it is twice that number.
    A remat policy can save the sum of the branches under the checkpoint name "depthwise"; of branches with statistics
    of images, the convolutions' outputs.
    """

    features: int
    use_se: bool = False
    form: str = "branched"
    batch_stats: int = 0
    init_std: float = 0.02
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        size = dict(features=self.features, stride=2, depthwise=True, kernels=self.kernels)
        if self.form == "folded":
            y = checkpoint_name(FoldedConv(kernel_size=7, **size, name="folded")(x_BHWC), "depthwise")
        else:
            size |= dict(batch_stats=self.batch_stats, keep="depthwise" if self.batch_stats else "")
            large = ConvBN(kernel_size=7, **size, name="large")
            small = ConvBN(kernel_size=3, **size, name="small")
            if self.batch_stats:
                y = added([branch.term(x_BHWC, None, mask_B) for branch in (large, small)], self.kernels)
            else:
                y = checkpoint_name(large(x_BHWC) + small(x_BHWC), "depthwise")
        if self.use_se:
            y = SqueezeExcite(reduction=4, init_std=self.init_std, name="se")(y)
        setting = dict(form=self.form, batch_stats=self.batch_stats, kernels=self.kernels)
        pointwise = MobileOne(self.features, 1, **setting, name="pointwise")
        return pointwise(gelu(y), mask_B)


class ConditionalPositions(nn.Module):
    """Adds a conditional positional encoding: x + depthwise 7x7 of x (arXiv 2102.10882).

    In folded form the kernel includes the skip connection.
    """

    form: str = "branched"
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        name = "folded" if self.form == "folded" else "conv"
        y = FoldedConv(x_BHWC.shape[-1], 7, depthwise=True, kernels=self.kernels, name=name)(x_BHWC)
        return y if self.form == "folded" else x_BHWC + y


class ConvFFN(nn.Module):
    """Computes depthwise 7x7 -> BatchNorm -> 1x1 (C * ratio) -> GELU -> 1x1, times `scale` [C], and adds `skip`."""

    ratio: float = 4.0
    batch_stats: int = 0
    init_std: float = 0.02
    kernels: str = "auto"

    @nn.compact
    def __call__(
        self, x_BHWC: Array, scale: Array, mask_B: Array | None = None, skip_BHWC: Array | None = None
    ) -> Array:
        C = x_BHWC.shape[-1]
        setting = dict(batch_stats=self.batch_stats, kernels=self.kernels)
        conv7 = ConvBN(C, 7, depthwise=True, kernel_init=small_init, keep="depthwise", **setting, name="conv")
        x = conv7(x_BHWC, mask_B)
        hidden = int(C * self.ratio)
        fc1 = Dense(hidden, init_std=self.init_std, name="fc1").weights(x)
        fc2 = Dense(C, init_std=self.init_std, name="fc2").weights(jax.ShapeDtypeStruct((hidden,), x.dtype), scale)
        return mlp(x, *fc1, *fc2, skip_BHWC, kernels=self.kernels)


class RepMixer(nn.Module):
    """Mixes tokens: x + ls * (MobileOne 3x3 - BN(x)); in folded form one depthwise 3x3 that includes the skip."""

    layer_scale_init: float = 1e-5
    form: str = "branched"
    batch_stats: int = 0
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None) -> Array:
        C = x_BHWC.shape[-1]
        if self.form == "folded":
            return FoldedConv(C, 3, depthwise=True, kernels=self.kernels, name="folded")(x_BHWC)
        setting = dict(batch_stats=self.batch_stats, kernels=self.kernels)
        mixer = MobileOne(C, 3, depthwise=True, activation=None, **setting, name="mixer")
        norm = BatchNorm(**setting, name="norm")
        scale = layer_scale(self, "layer_scale", C, self.layer_scale_init)
        if not self.batch_stats:
            return x_BHWC + scale.astype(x_BHWC.dtype) * (mixer(x_BHWC) - norm(x_BHWC))
        found = moments(x_BHWC, self.kernels)  # of x: those of the skip branch, the 1x1 branch and the norm follow
        mixed = mixer.terms(x_BHWC, found, mask_B)
        scaled = [term.times(scale) for term in (*mixed, norm.term(x_BHWC, found, mask_B).times(-1))]
        return added([whole(x_BHWC), *scaled], self.kernels)


class SelfAttention(nn.Module):
    """Applies multi-head attention over all positions of an image, times `scale` [C].

    A head has `head_dim` channels; qkv has no bias.
    """

    head_dim: int = HEAD_DIM
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array, scale: Array) -> Array:
        B, H, W, C = x_BHWC.shape
        qkv_BNX = Dense(3 * C, use_bias=False, init_std=self.init_std, name="qkv")(x_BHWC.reshape(B, H * W, C))
        mixed = self_attention(qkv_BNX, self.head_dim)
        mixed = checkpoint_name(mixed.reshape(B, H, W, C), "attention")
        return Dense(C, init_std=self.init_std, name="proj")(mixed, scale)


class Block(nn.Module):
    """Applies one encoder block: a RepMixer block or an attention block, as `mixer` says ("repmixer" | "attention").

    repmixer:   x = RepMixer(x);                       x = x + ls * ConvFFN(x)
    attention:  x = x + ls1 * SelfAttention(norm(x));  x = x + ls2 * ConvFFN(x)     (no norm before the FFN)

    `attention_norm` is "layer" (LayerNorm over the channels of a position) or "batch" (BatchNorm).
    """

    mixer: str
    ratio: float = 4.0
    layer_scale_init: float = 1e-5
    attention_norm: str = "layer"
    form: str = "branched"
    batch_stats: int = 0
    init_std: float = 0.02
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BHWC: Array, drop_rate: Array, mask_B: Array | None = None) -> Array:
        rng = self.make_rng("drop_path") if self.has_rng("drop_path") else None
        rng_mixer, rng_ffn = (None, None) if rng is None else jax.random.split(rng)
        C, init, x = x_BHWC.shape[-1], self.layer_scale_init, x_BHWC
        if self.mixer == "repmixer":
            x = RepMixer(init, self.form, self.batch_stats, self.kernels, name="mixer")(x, mask_B)
        else:
            if self.attention_norm == "batch":
                normed = BatchNorm(self.batch_stats, kernels=self.kernels, name="norm")(x, mask_B)
            else:
                normed = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=x.dtype, name="norm")(x)
            scale = layer_scale(self, "layer_scale_mixer", C, init)
            mixed = SelfAttention(init_std=self.init_std, name="mixer")(normed, scale)
            x = x + drop_path(mixed, drop_rate, rng_mixer)
        scale = layer_scale(self, "layer_scale_ffn", C, init)
        ffn = ConvFFN(self.ratio, self.batch_stats, self.init_std, self.kernels, name="ffn")
        if rng_ffn is None:
            return ffn(x, scale, mask_B, x)
        return x + drop_path(ffn(x, scale, mask_B), drop_rate, rng_ffn)
