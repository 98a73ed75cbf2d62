"""FastViTHD, the hybrid convolution-transformer encoder of FastVLM (section 3.2), and its family.

stem /4 -> stage 0 -> [patch embed -> (positions) -> stage] x 4 -> 3x3 expansion C -> 2C with squeeze-excite
grid   H/4        H/4                H/8 ... H/64                 H/64
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax.models.blocks import FORMS, Block, ConditionalPositions, MobileOne, PatchEmbed

Array = jax.Array


class FastViT(nn.Module):
    """Encodes images [B, H, W, 3] in [0, 1] to feature maps [B, H/s, W/s, 2 * embed_dims[-1]], s = 64 for FastViTHD.

    Attributes:
      layers, embed_dims: blocks and channels of each stage.
      mixers: "repmixer" or "attention", a stage.
      mlp_ratio: width of the ConvFFN over its channels.
      layer_scale_init: initial factor of every residual branch.
      init_std: of the initial weights of the 1x1 and linear layers; narrow towers need more than the published 0.02.
      drop_path: rate of the last block; it grows linearly from 0 and acts only with a `drop_path` rng.
      form: "branched" (training) or "folded" (released weights).
      batch_norm: "train" or "frozen"; with "train", a call with train=True updates the statistics.
      remat: recompute blocks in the backward pass.

    Raises:
      ValueError: unknown form, or an image size that the strides do not divide.
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
    remat: bool = False

    @property
    def stride(self) -> int:
        return 4 * 2 ** (len(self.layers) - 1)

    @property
    def features(self) -> int:
        return 2 * self.embed_dims[-1]

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None, *, train: bool = False) -> Array:
        if self.form not in FORMS or self.batch_norm not in ("train", "frozen"):
            raise ValueError(
                f"form={self.form!r} must be one of {FORMS}, batch_norm={self.batch_norm!r} train or frozen"
            )
        H, W = x_BHWC.shape[1:3]
        if H % self.stride or W % self.stride:
            raise ValueError(f"image size {H}x{W} must be a multiple of {self.stride} in both directions")
        shared = dict(form=self.form, batch_stats=train and self.batch_norm == "train", init_std=self.init_std)
        dim = self.embed_dims[0]
        x = MobileOne(dim, 3, 2, use_scale=False, **shared, name="stem_0")(x_BHWC, mask_B)
        x = MobileOne(dim, 3, 2, depthwise=True, use_scale=False, **shared, name="stem_1")(x, mask_B)
        x = MobileOne(dim, 1, **shared, name="stem_2")(x, mask_B)
        rates = np.split(np.linspace(0, self.drop_path, sum(self.layers)), np.cumsum(self.layers)[:-1])
        for i, (depth, dim, mixer) in enumerate(zip(self.layers, self.embed_dims, self.mixers, strict=True)):
            if i > 0:
                x = PatchEmbed(dim, **shared, name=f"patch_embed_{i}")(x, mask_B)
            if mixer == "attention":
                x = ConditionalPositions(self.form, name=f"positions_{i}")(x)
            body = nn.remat(Block, prevent_cse=False) if self.remat else Block
            stage = nn.scan(
                lambda block, x, rate, mask: (block(x, rate, mask), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "drop_path": True},
                in_axes=(0, nn.broadcast),
                length=depth,
            )
            block = body(mixer, self.mlp_ratio, self.layer_scale_init, **shared, name=f"stage_{i}")
            x, _ = stage(block, x, jnp.asarray(rates[i], x.dtype), mask_B)
        expand = MobileOne(self.features, 3, depthwise=True, use_se=True, **shared, name="expand")
        return expand(x, mask_B)
