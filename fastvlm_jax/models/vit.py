"""Vision transformers: the image towers of CLIP ViT-L/14 (336 px) and SigLIP-SO400M/14 (384 px), the paper's baselines.

                 CLIP ViT-L/14                         SigLIP-SO400M/14
    embeddings   patches, class token, LayerNorm       patches with bias
    MLP          x * sigmoid(1.702 x)                  GELU in its tanh form
    features     [B, 24, 24, 1024]                     [B, 27, 27, 1152]: 384 = 27 * 14 + 6, the last 6 px are ignored

Legend: B images, H W rows and columns, h w patches, N tokens, C channels, m heads, e head dim.
Sources: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343); FastVLM (arXiv 2412.13303) Tables 1 and 6.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.models import lora
from fastvlm_jax.models.layers import Dense
from fastvlm_jax.models.remat import rematted
from fastvlm_jax.sharding import gathered

Array = jax.Array
# The keys are names in a transformers config.json.
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": gelu,
}


class PatchConv(nn.Module):
    """Applies a convolution with kernel and stride `size` and no padding; leftover rows and columns are ignored."""

    features: int
    size: int
    use_bias: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        init = nn.initializers.truncated_normal(self.init_std)
        kernel = self.param("kernel", init, (self.size, self.size, x_BHWC.shape[-1], self.features), jnp.float32)
        strides = (self.size, self.size)
        x = jax.lax.conv_general_dilated(
            x_BHWC, gathered(kernel, None, x_BHWC.dtype), strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)
        return x


def layer_norm(x: Array, epsilon: float, name: str) -> Array:
    """Applies LayerNorm over the channels, with float32 statistics, as the submodule `name` of the calling module."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=x.dtype, name=name)(x)


class Block(nn.Module):
    """Computes x = x + Attention(LN(x)); x = x + MLP(LN(x)). Attention is over all tokens, its softmax in float32.

    Attributes:
      inits: settings of Dense for the initial weights of "qkv", "o", "fc1" and "fc2"; without them all have `init_std`.
      fused: whether one product makes queries, keys and values, with weights in this order.
    """

    num_heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    init_std: float = 0.02
    inits: dict | None = None
    fused: bool = False

    @nn.compact
    def __call__(self, x_BNC: Array) -> Array:
        B, N, C = x_BNC.shape
        head_dim = C // self.num_heads
        inits = self.inits or {name: {"init_std": self.init_std} for name in ("qkv", "o", "fc1", "fc2")}
        y = layer_norm(x_BNC, self.epsilon, "attention_norm")
        if self.fused:
            parts = jnp.split(Dense(3 * C, **inits["qkv"], name="qkv")(y), 3, axis=-1)
        else:
            parts = [Dense(C, **inits["qkv"], name=name)(y) for name in "qkv"]
        q, k, v = (part.reshape(B, N, self.num_heads, head_dim) for part in parts)
        scores_BmNN = jnp.einsum("bqme,bkme->bmqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights_BmNN = jax.nn.softmax(scores_BmNN).astype(x_BNC.dtype)
        mixed = jnp.einsum("bmqk,bkme->bqme", weights_BmNN, v).reshape(B, N, C)
        mixed = checkpoint_name(mixed, "attention")
        x = x_BNC + Dense(C, **inits["o"], name="o")(mixed)
        y = Dense(self.mlp_dim, **inits["fc1"], name="fc1")(layer_norm(x, self.epsilon, "mlp_norm"))
        return x + Dense(C, **inits["fc2"], name="fc2")(ACTIVATIONS[self.activation](y))


class PoolingHead(nn.Module):
    """Declares the weights of SigLIP's attention pooling: a learned query, attention, LayerNorm and MLP."""

    mlp_dim: int
    epsilon: float
    init_std: float

    @nn.compact
    def __call__(self, x_BNC: Array) -> None:
        C = x_BNC.shape[-1]
        self.param("probe", nn.initializers.normal(self.init_std), (1, 1, C), jnp.float32)
        Dense(3 * C, init_std=self.init_std, name="qkv")(x_BNC)
        x = layer_norm(Dense(C, init_std=self.init_std, name="o")(x_BNC), self.epsilon, "mlp_norm")
        Dense(C, init_std=self.init_std, name="fc2")(Dense(self.mlp_dim, init_std=self.init_std, name="fc1")(x))


class Unused(nn.Module):
    """Declares the weights of a published tower that the features do not use: later layers, final norm and head.

    It is called only at initialization. The weights are kept so that the complete tower can be exported; they share one
    name, so that one pattern freezes them all.
    """

    block: dict
    layers: Sequence[int]
    pooling_head: bool

    @nn.compact
    def __call__(self, x_BNC: Array) -> None:
        for i in self.layers:
            Block(**self.block, name=f"layer_{i}")(x_BNC)
        epsilon, init_std = self.block["epsilon"], self.block["init_std"]
        layer_norm(x_BNC, epsilon, "final_norm")
        if self.pooling_head:
            PoolingHead(self.block["mlp_dim"], epsilon, init_std, name="head")(x_BNC)


class ViT(nn.Module):
    """Encodes normalised images [B, image_size, image_size, 3] to feature maps [B, h, w, width].

    Attributes:
      image_size: side of the images, pixels; h = w = floor(image_size / patch_size).
      patch_size: side of a patch, pixels.
      width: channels of the residual stream.
      num_layers: number of layers.
      num_heads: attention heads of a layer.
      mlp_dim: hidden width of the MLP.
      activation: activation of the MLP, by its name in transformers: "quick_gelu", "gelu_pytorch_tanh" or "gelu".
      cls_token: whether a class token is put before the patches; the features leave it out.
      pre_norm: whether LayerNorm follows the embeddings and the patch embedding has no bias, as in CLIP.
      epsilon: epsilon of every LayerNorm.
      select_layer: layer whose output is returned as features, without a final norm: transformers'
        hidden_states[select_layer]. -1 is the last layer, -2 the one before. LLaVA-1.5 uses -2 of CLIP. The paper does
        not say which layer of SigLIP it uses; we use -2 too, because LLaVA-style models on SigLIP delete its last
        layer and use the output of the new last one.
      pooling_head: whether the (unused) weights include SigLIP's attention pooling head.
      image_mean, image_std: mean and standard deviation of each colour, for images in [0, 1]; the caller normalises.
      init_std: standard deviation of the initial weights.
      remat: policy of models/remat.py that says what the backward pass recomputes.

    Weights that do not affect the features are under `unused/`: no computation uses them and their gradient is 0.

    Raises:
      ValueError: the activation is unknown; the patch size, selected layer or number of heads does not fit the other
        sizes; or the images have another size.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    cls_token: bool = True
    pre_norm: bool = True
    epsilon: float = 1e-5
    select_layer: int = -2
    pooling_head: bool = False
    image_mean: Sequence[float] = (0.0, 0.0, 0.0)
    image_std: Sequence[float] = (1.0, 1.0, 1.0)
    init_std: float = 0.02
    remat: str = "none"

    @property
    def features(self) -> int:
        return self.width

    @property
    def used_layers(self) -> int:
        """Number of layers that are computed, counted from the first."""
        return self.num_layers + 1 + self.select_layer

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the number of patches (h, w) of an image of this size in pixels.

        Raises:
          ValueError: the size is not image_size x image_size.
        """
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"image size {height}x{width} must be {self.image_size}x{self.image_size}: "
                "the learned positions of this vision transformer fit no other size"
            )
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @nn.compact
    def __call__(self, x_BHWC: Array, mask_B: Array | None = None, *, train: bool = False) -> Array:
        self._check()
        B, (h, w), C = x_BHWC.shape[0], self.grid(*x_BHWC.shape[1:3]), self.width
        normal = nn.initializers.normal(self.init_std)
        patch_embed = PatchConv(C, self.patch_size, not self.pre_norm, self.init_std, name="patch_embed")
        x = patch_embed(x_BHWC).reshape(B, h * w, C)
        if self.cls_token:
            token = self.param("cls_token", normal, (C,), jnp.float32).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (B, 1, C)), x], axis=1)
        x += self.param("positions", normal, x.shape[1:], jnp.float32).astype(x.dtype)
        if self.pre_norm:
            x = layer_norm(x, self.epsilon, "pre_norm")
        block = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            epsilon=self.epsilon,
            init_std=self.init_std,
        )
        body = rematted(Block, self.remat)
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, lora.NAME: 0},
            split_rngs={"params": True},
            length=self.used_layers,
        )
        x, _ = layers(body(**block, name="layers"), x, None)
        if self.is_initializing():
            Unused(block, range(self.used_layers, self.num_layers), self.pooling_head, name="unused")(x)
        return x[:, int(self.cls_token) :].reshape(B, h, w, C)

    def _check(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}")
        if not -self.num_layers <= self.select_layer <= -1:
            raise ValueError(f"select_layer={self.select_layer} must lie between -{self.num_layers} and -1")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size={self.patch_size} must lie between 1 and image_size={self.image_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
