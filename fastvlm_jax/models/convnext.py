"""ConvNeXt-L and ConvNeXt-XXL, image towers of CLIP models and baselines of the paper (Tables 3 and 4).

    stem 4x4 stride 4, LN -> stage 0 -> [LN, conv 2x2 stride 2 -> stage] x 3
    grid H/4                H/4          H/8 ... H/32
    block: x + ls * fc2(GELU(fc1(LN(depthwise 7x7(x)))))

Legend: B images, H W rows and columns, C channels.
Sources: ConvNeXt (arXiv 2201.03545); timm's convnext_large and convnext_xxlarge, which open_clip's towers use.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.kernels.depthwise import depthwise_conv
from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.models import lora
from fastvlm_jax.models.layers import Dense, layer_scale
from fastvlm_jax.models.remat import rematted
from fastvlm_jax.models.vit import PatchConv, layer_norm

Array = jax.Array


class Block(nn.Module):
    """Computes x + ls * (depthwise 7x7 -> LN -> 1x1 (4 C) -> GELU -> 1x1)(x)."""

    epsilon: float
    layer_scale_init: float
    init_std: float
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        C, dtype = x_BHWC.shape[-1], x_BHWC.dtype
        kernel = self.param("kernel", nn.initializers.truncated_normal(self.init_std), (7, 7, 1, C), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)
        y = depthwise_conv(x_BHWC, kernel.astype(dtype), kernels=self.kernels) + bias.astype(dtype)
        y = Dense(4 * C, init_std=self.init_std, name="fc1")(layer_norm(y, self.epsilon, "norm"))
        scale = layer_scale(self, "layer_scale", C, self.layer_scale_init)
        return x_BHWC + Dense(C, init_std=self.init_std, name="fc2")(gelu(y), scale)


class Unused(nn.Module):
    """Declares the weights that follow the feature map in a CLIP tower: the norm of its mean, and the projection.

    It is called only at initialization. The weights are kept so that the complete tower can be exported; they share one
    name, so that one pattern freezes them all.
    """

    projection: Sequence[int]
    projection_bias: bool
    epsilon: float
    init_std: float

    @nn.compact
    def __call__(self, x_BC: Array) -> None:
        x = layer_norm(x_BC, self.epsilon, "norm")
        for i, features in enumerate(self.projection, start=1):
            bias = self.projection_bias or i < len(self.projection)
            x = Dense(features, bias, self.init_std, name=f"fc{i}")(x)


class ConvNeXt(nn.Module):
    """Encodes normalised images [B, H, W, 3] to feature maps [B, H/32, W/32, embed_dims[-1]].

    The map is the output of the last stage, timm's `forward_features`. No norm follows it, because CLIP's norm comes
    after the pooling. The paper does not say which features it uses.

    Attributes:
      layers: number of blocks in each stage.
      embed_dims: channels of each stage.
      epsilon: epsilon of every LayerNorm; 1e-5 in ConvNeXt-XXL.
      layer_scale_init: initial factor of every residual branch.
      projection: widths of the CLIP projection, one of the (unused) weights: (hidden, output) for an MLP, (output,) for
        a matrix, () for none.
      projection_bias: whether the last layer of the projection has a bias: True in timm, False in open_clip.
      image_mean, image_std: mean and standard deviation of each colour, for images in [0, 1]; the caller normalises.
      init_std: standard deviation of the initial weights.
      remat: policy of models/remat.py that says what the backward pass recomputes.
      kernels: whether TPU kernels are used: "auto", "none" or "interpret", see kernels/choice.py.

    Weights that do not affect the map are under `unused/`: no computation uses them and their gradient is 0.

    Raises:
      ValueError: the image size is not a multiple of the stride.
    """

    layers: Sequence[int] = (3, 3, 27, 3)
    embed_dims: Sequence[int] = (192, 384, 768, 1536)
    epsilon: float = 1e-6
    layer_scale_init: float = 1e-6
    projection: Sequence[int] = ()
    projection_bias: bool = False
    image_mean: Sequence[float] = (0.0, 0.0, 0.0)
    image_std: Sequence[float] = (1.0, 1.0, 1.0)
    init_std: float = 0.02
    remat: str = "none"
    kernels: str = "auto"

    @property
    def stride(self) -> int:
        return 4 * 2 ** (len(self.layers) - 1)

    @property
    def features(self) -> int:
        return self.embed_dims[-1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (rows, columns) of the feature map of an image of this size in pixels.

        Raises:
          ValueError: the size is not a multiple of the stride.
        """
        if height % self.stride or width % self.stride or not height * width:
            raise ValueError(f"image size {height}x{width} must be a multiple of {self.stride} in both directions")
        return height // self.stride, width // self.stride

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None, *, train: bool = False) -> Array:
        self.grid(*x_BHWC.shape[1:3])
        body = rematted(Block, self.remat)
        x = PatchConv(self.embed_dims[0], 4, init_std=self.init_std, name="stem")(x_BHWC)
        x = layer_norm(x, self.epsilon, "stem_norm")
        for i, (depth, dim) in enumerate(zip(self.layers, self.embed_dims, strict=True)):
            if i > 0:
                x = layer_norm(x, self.epsilon, f"downsample_norm_{i}")
                x = PatchConv(dim, 2, init_std=self.init_std, name=f"downsample_{i}")(x)
            stage = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0, lora.NAME: 0},
                split_rngs={"params": True},
                length=depth,
            )
            block = body(self.epsilon, self.layer_scale_init, self.init_std, self.kernels, name=f"stage_{i}")
            x, _ = stage(block, x, None)
        if self.is_initializing():
            head = Unused(self.projection, self.projection_bias, self.epsilon, self.init_std, name="unused")
            head(jnp.mean(x, axis=(1, 2)))
        return x
