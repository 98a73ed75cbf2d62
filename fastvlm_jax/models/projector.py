"""The projector between encoder and language model: the two-layer perceptron of LLaVA-1.5."""

import flax.linen as nn
import jax

from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.models.layers import Dense


class Projector(nn.Module):
    """Maps image features [..., C] to the language model's width [..., D]: Dense, GELU, Dense."""

    features: int
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(Dense(self.features, init_std=self.init_std, name="fc1")(x))
        return Dense(self.features, init_std=self.init_std, name="fc2")(x)
