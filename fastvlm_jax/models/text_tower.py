"""The text tower of MobileCLIP-S3, -S4 and MobileCLIP2: it embeds a caption beside the image tower's embedding.

    tokens     start  a  photo  end  0  0 ... 0            77 of them; 0 is the piece "!", and is attended to
    output                      ^ the largest id            its features, projected, are the embedding

No token is masked: neither those that follow nor the padding. So a caption must be padded to exactly `context_length`
tokens: other padding changes its embedding.

Legend: B texts, T tokens, C channels, V vocabulary, F width of the embedding.
Source: open_clip's TextTransformer with `no_causal_mask`, which MobileCLIP2 (arXiv 2508.20691) uses.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.kernels.embedding import embed
from fastvlm_jax.models.remat import rematted
from fastvlm_jax.models.vit import Block, layer_norm
from fastvlm_jax.sharding import gathered, sharded

Array = jax.Array


def initial_weights(width: int, num_layers: int) -> dict[str, dict]:
    """Returns `inits` of vit.Block as open_clip has them: normal, smaller in front of the residual stream."""
    normal, uniform = nn.initializers.normal, nn.initializers.uniform
    inwards = normal(width**-0.5 * (2 * num_layers) ** -0.5)

    def biases(fan_in: int):  # PyTorch's default, which open_clip leaves as it is: uniform around 0
        return lambda rng, shape, dtype: uniform(2 * fan_in**-0.5)(rng, shape, dtype) - fan_in**-0.5

    return {
        "qkv": {"kernel_init": normal(width**-0.5)},
        "o": {"kernel_init": inwards},
        "fc1": {"kernel_init": normal((2 * width) ** -0.5), "bias_init": biases(width)},
        "fc2": {"kernel_init": inwards, "bias_init": biases(4 * width)},
    }


class TextTower(nn.Module):
    """Embeds texts: int32 tokens [B, context_length] to [B, features]; the embedding is not normalised.

    Attributes:
      features: width of the embedding.
      width: channels of the residual stream.
      num_layers, num_heads: number of layers, and of attention heads in each.
      vocab_size: ids of CLIP's tokenizer; the largest one is its end token.
      context_length: tokens of a text.
      epsilon: epsilon of every LayerNorm.
      remat: policy of models/remat.py that says what the backward pass recomputes.

    Raises:
      ValueError: the tokens have another length, or the heads do not divide the width.
    """

    features: int = 768
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 49_408
    context_length: int = 77
    epsilon: float = 1e-5
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens_BT: Array, dtype=jnp.float32) -> Array:
        if tokens_BT.shape[1] != self.context_length:
            raise ValueError(
                f"texts of {tokens_BT.shape[1]} tokens must have {self.context_length}: pad them, because this tower "
                "reads the padding too"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} of the text tower must be a multiple of num_heads={self.num_heads}")
        C, normal = self.width, nn.initializers.normal
        init = sharded(normal(0.02), ("vocab", None))
        table_VC = self.param("embedding", init, (self.vocab_size, C), jnp.float32)
        positions_TC = self.param("positions", normal(0.01), (self.context_length, C), jnp.float32)
        x = embed(table_VC, tokens_BT, dtype) + positions_TC.astype(dtype)
        block = dict(num_heads=self.num_heads, mlp_dim=4 * C, activation="gelu", epsilon=self.epsilon)
        block |= dict(inits=initial_weights(C, self.num_layers), fused=True)
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        x, _ = layers(rematted(Block, self.remat)(**block, name="layers"), x, None)
        last_BC = jnp.take_along_axis(x, jnp.argmax(tokens_BT, axis=1)[:, None, None], axis=1)[:, 0]
        last_BC = layer_norm(last_BC, self.epsilon, "final_norm")
        projection_CF = self.param("projection", normal(C**-0.5), (C, self.features), jnp.float32)
        return last_BC @ gathered(projection_CF, None, dtype)
