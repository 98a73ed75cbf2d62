"""The FastViT family: FastViTHD, the hybrid encoder of FastVLM (section 3.2), and the MobileCLIP encoders MCi0 to MCi4.

stem /4 -> stage 0 -> [patch embed -> (positions) -> stage] x 4 -> 3x3 expansion C -> 2C with squeeze-excite
grid   H/4        H/4                H/8 ... H/64                 H/64

FastViTHD (MCi3) and MCi4 have five stages; MCi0 to MCi2 have four and end at H/32. The sizes: sizes.VISION_SIZES.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax.kernels import choice, repmixer_stage, training_stage
from fastvlm_jax.kernels.image_conv import image_conv, pixel_conv
from fastvlm_jax.models import lora
from fastvlm_jax.models.blocks import FORMS, HEAD_DIM, Block, ConditionalPositions, MobileOne, PatchEmbed
from fastvlm_jax.models.layers import BatchNorm, Dense, group_size
from fastvlm_jax.models.remat import rematted, saved
from fastvlm_jax.models.stage_weights import new_statistics, stage_weights, training_weights

Array = jax.Array
# The stem's first two convolutions: the usual ones, and those of kernels/image_conv.py.
USUAL, ON_TPU = (None, None), (image_conv, pixel_conv)
CHOICES = {
    "form": FORMS,
    "batch_norm": ("train", "frozen"),
    "attention_norm": ("layer", "batch"),
    "multiscale_pool": ("average", "depthwise"),
    "kernels": choice.KERNELS,
}


class GridPool(nn.Module):
    """Pools [B, h*k, w*k, C] to [B, h, w, C], k = `ratio`, by the mean of each k x k window or a learned weighted sum.

    The learned kernel [k, k, 1, C] has one weight per tap and channel and starts as the mean. It has no bias, because
    the projector that follows has one.
    """

    ratio: int
    learned: bool

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        (B, H, W, C), k = x_BHWC.shape, self.ratio
        windows = x_BHWC.reshape(B, H // k, k, W // k, k, C).astype(jnp.float32)
        if not self.learned:
            return jnp.mean(windows, axis=(2, 4)).astype(x_BHWC.dtype)
        kernel = self.param("kernel", nn.initializers.constant(1 / k**2), (k, k, 1, C), jnp.float32)
        return jnp.sum(windows * kernel.reshape(k, 1, k, C), axis=(2, 4)).astype(x_BHWC.dtype)


def _stem(tower: "FastViT", x_BHWC: Array, mask_B: Array | None, *, dim: int, settings: dict) -> Array:
    """Maps images [B, H, W, 3] to [B, H/4, W/4, dim] with submodules of `tower`."""
    convolve = ON_TPU if choice.used(tower.kernels) and not tower.is_initializing() else USUAL
    x = MobileOne(dim, 3, 2, convolve=convolve[0], **settings, name="stem_0")(x_BHWC, mask_B)
    x = MobileOne(dim, 3, 2, depthwise=True, convolve=convolve[1], **settings, name="stem_1")(x, mask_B)
    return MobileOne(dim, 1, **settings, name="stem_2")(x, mask_B)


class FastViT(nn.Module):
    """Encodes normalised images [B, H, W, 3] to feature maps [B, H/s, W/s, features], s = 64 for FastViTHD.

    `features` is 2 * embed_dims[-1], plus the channels that `multiscale` adds. With embed=True a call returns the CLIP
    embedding [B, head_features] instead: the mean of the final features over all positions, projected.

    Attributes:
      layers: number of blocks in each stage.
      embed_dims: channels of each stage.
      mixers: token mixer of each stage, "repmixer" or "attention".
      mlp_ratio: hidden width of the ConvFFN, as a multiple of its channels.
      layer_scale_init: initial factor of every residual branch.
      init_std: standard deviation of the initial weights of 1x1 and linear layers; narrow towers need more than the
        published 0.02.
      drop_path: drop rate of the last block; the rate grows linearly from 0 at the first block and applies only to
        calls with a `drop_path` rng.
      form: "branched" (training) or "folded" (released weights).
      batch_norm: "train" or "frozen"; with "train", calls with train=True use and update batch statistics.
      batch_norm_images: with batch statistics, images that share them; -1 means all of the batch.
      remat: policy of models/remat.py that says what the backward pass recomputes.
      stem_scale: whether the stem's 3x3 convolutions have a 1x1 branch in training form, as in MCi0 to MCi2.
      se_stages: stages whose patch embed has squeeze-excite; (2, 3) in MCi0 to MCi2.
      attention_norm: norm before self-attention, "batch" (MCi0 to MCi2) or "layer".
      head_features: width of the CLIP projection; 0 means none. Its parameters exist, unused, without embed=True too.
      head_bias: whether the projection has a bias: True in timm, False in Apple's weights.
      multiscale: stages, counted from 0 and without the last, whose outputs are pooled to the last grid and
        concatenated, in stage order, before the channels of the final features. The paper shows this (Figure 2;
        Table 2: Avg-5 +0.1 with average pooling, +0.3 with depthwise), but its released checkpoints do not use it. It
        does not say which stages it pools, the size, bias and initialization of the learned kernels, or which of its
        results used them.
      multiscale_pool: "average", or "depthwise": for each stage a learned k x k convolution of stride k, where k is the
        ratio of the grids.
      kernels: whether TPU kernels are used: "auto", "none" or "interpret", see kernels/choice.py.
      image_mean, image_std: mean and standard deviation of each colour, for images in [0, 1]; the caller normalises.

    Raises:
      ValueError: a choice or stage is unknown, or the image size is not a multiple of the stride.
    """

    layers: Sequence[int] = (2, 12, 24, 4, 2)
    embed_dims: Sequence[int] = (96, 192, 384, 768, 1536)
    mixers: Sequence[str] = ("repmixer", "repmixer", "repmixer", "attention", "attention")
    mlp_ratio: float = 4.0
    layer_scale_init: float = 1e-5
    init_std: float = 0.02
    drop_path: float = 0.0
    form: str = "branched"
    batch_norm: str = "frozen"
    batch_norm_images: int = -1
    remat: str = "none"
    stem_scale: bool = False
    se_stages: Sequence[int] = ()
    attention_norm: str = "layer"
    head_features: int = 0
    head_bias: bool = False
    multiscale: Sequence[int] = ()
    multiscale_pool: str = "average"
    kernels: str = "auto"
    image_mean: Sequence[float] = (0.0, 0.0, 0.0)
    image_std: Sequence[float] = (1.0, 1.0, 1.0)

    @property
    def stride(self) -> int:
        return 4 * 2 ** (len(self.layers) - 1)

    @property
    def features(self) -> int:
        return sum(self.embed_dims[i] for i in self.multiscale) + 2 * self.embed_dims[-1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (rows, columns) of the feature map of an image of this size in pixels.

        Raises:
          ValueError: the size is not a multiple of the stride.
        """
        if height % self.stride or width % self.stride or not height * width:
            raise ValueError(f"image size {height}x{width} must be a multiple of {self.stride} in both directions")
        return height // self.stride, width // self.stride

    @nn.compact
    def __call__(
        self, x_BHWC: Array, mask_B: Array | None = None, *, train: bool = False, embed: bool = False
    ) -> Array:
        self._check(embed)
        self.grid(*x_BHWC.shape[1:3])
        batch_stats = self.batch_norm_images if train and self.batch_norm == "train" else 0
        shared = dict(form=self.form, batch_stats=batch_stats, init_std=self.init_std, kernels=self.kernels)
        stem = partial(_stem, dim=self.embed_dims[0], settings=dict(shared, use_scale=self.stem_scale))
        x = rematted(stem, self.remat, scanned=False)(self, x_BHWC, mask_B)
        rates = np.split(np.linspace(0, self.drop_path, sum(self.layers)), np.cumsum(self.layers)[:-1])
        pooled = []
        for i, (dim, mixer) in enumerate(zip(self.embed_dims, self.mixers, strict=True)):
            if i > 0:
                patch_embed = rematted(PatchEmbed, self.remat, scanned=False)
                x = patch_embed(dim, i in self.se_stages, **shared, name=f"patch_embed_{i}")(x, mask_B)
            if mixer == "attention":
                x = ConditionalPositions(self.form, self.kernels, name=f"positions_{i}")(x)
            if self._as_one(i, x, batch_stats):
                x = self._stage_as_one(i, x, mask_B, batch_stats)
            else:
                x = self._stage(i, x, mask_B, rates[i], shared)
            if i in self.multiscale:
                ratio = 2 ** (len(self.layers) - 1 - i)
                pooled.append(GridPool(ratio, self.multiscale_pool == "depthwise", name=f"pool_{i}")(x))
        expand = MobileOne(2 * self.embed_dims[-1], 3, depthwise=True, use_se=True, **shared, name="expand")
        x = expand(x, mask_B)
        if embed or (self.head_features and self.is_initializing()):
            mean_BC = jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)
            head = Dense(self.head_features, self.head_bias, init_std=x.shape[-1] ** -0.5, name="head")
            embedding_BE = head(mean_BC)
            if embed:
                return embedding_BE
        return jnp.concatenate([*pooled, x], axis=-1) if pooled else x

    def _stage(self, i: int, x_BHWC: Array, mask_B: Array | None, rates: np.ndarray, shared: dict) -> Array:
        """Applies the blocks of stage i, in a scan."""
        stage = nn.scan(
            lambda block, x, rate, mask: (block(x, rate, mask), None),
            variable_axes={"params": 0, "batch_stats": 0, lora.NAME: 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, nn.broadcast),
            length=self.layers[i],
        )
        size = (self.mixers[i], self.mlp_ratio, self.layer_scale_init, self.attention_norm)
        block = rematted(Block, self.remat)(*size, **shared, name=f"stage_{i}")
        return stage(block, x_BHWC, jnp.asarray(rates, x_BHWC.dtype), mask_B)[0]

    def _as_one(self, i: int, x_BHWC: Array, batch_stats: int) -> bool:
        """Returns whether stage i runs as one function of kernels."""
        if self.mixers[i] != "repmixer" or self.has_rng("drop_path") or self.is_initializing():
            return False
        if not choice.used(self.kernels) or (batch_stats and self.form == "folded"):
            return False
        stage = training_stage if batch_stats else repmixer_stage
        return stage.fits(x_BHWC, int(self.embed_dims[i] * self.mlp_ratio))

    def _stage_as_one(self, i: int, x_BHWC: Array, mask_B: Array | None, batch_stats: int) -> Array:
        """Applies the blocks of stage i: one function with the variables of `_stage`."""
        name, keep, interpret = f"stage_{i}", saved(self.remat, x_BHWC.shape[-1]), self.kernels == "interpret"
        params, stats = self.variables["params"][name], self.variables["batch_stats"][name]
        params = lora.merged(params, self.variables.get(lora.NAME, {}).get(name, {}))
        if not batch_stats:
            return repmixer_stage.stage(x_BHWC, stage_weights(params, stats, x_BHWC.dtype), keep, interpret)
        mask_B = jnp.ones(len(x_BHWC)) if mask_B is None else mask_B.astype(jnp.float32)
        weights, images = training_weights(params, x_BHWC.dtype), group_size(len(x_BHWC), batch_stats)
        x, *found = training_stage.stage(x_BHWC, *weights, mask_B, images, keep, interpret)
        self.put_variable("batch_stats", name, new_statistics(stats, *found, BatchNorm.momentum))
        return x

    def _check(self, embed: bool) -> None:
        """Raises ValueError if the arguments do not describe a valid tower."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}")
        stages = range(len(self.layers))
        for i, (dim, mixer) in enumerate(zip(self.embed_dims, self.mixers, strict=False)):
            if mixer == "attention" and dim % HEAD_DIM:
                raise ValueError(
                    f"embed_dims[{i}]={dim} must be a multiple of {HEAD_DIM}, the width of attention heads"
                )
        if len(set(self.multiscale)) < len(self.multiscale) or not set(self.multiscale) <= set(stages[:-1]):
            raise ValueError(f"multiscale={self.multiscale} must name stages from {tuple(stages[:-1])}, each once")
        if not set(self.se_stages) <= set(stages[1:]):
            raise ValueError(f"se_stages={self.se_stages} must name stages with a patch embed: {tuple(stages[1:])}")
        if embed and not self.head_features:
            raise ValueError("embed=True needs the CLIP projection: set head_features to its width")
