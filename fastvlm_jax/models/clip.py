"""Two towers, one for images and one for texts, whose embeddings of a pair are alike: CLIP (arXiv 2103.00020).

    image [H, W, 3]  -> vision -> [F], length 1  \\
                                                  logit = exp(logit_scale) * product + logit_bias
    text  [77]       -> text   -> [F], length 1  /

Legend: G groups, N image slots a group, B texts, F width of the embeddings.
"""

import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fastvlm import make_encoder, normalised
from fastvlm_jax.models.layers import Dense
from fastvlm_jax.models.text_tower import TextTower

Array = jax.Array
SCALE = 1 / 0.07  # initial factor of the softmax loss's logits, as in CLIP
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # those of the sigmoid loss, as in SigLIP (arXiv 2303.15343)
MOST = math.log(100)  # `clamped` keeps logit_scale from 0 to this


class CLIP(nn.Module):
    """Embeds images and texts; parameters are under `vision/`, `text/`, `logit_scale` and, for sigmoid, `logit_bias`.

    A FastViT embeds with its own CLIP projection. Other encoders get one, `image_head/`, behind the mean of their map.

    Attributes:
      vision_args: "family" and constructor arguments of the encoder; see fastvlm.make_encoder.
      text_args: constructor arguments of TextTower.
      dtype: dtype of the computation.
      sigmoid: whether the logits are those of a sigmoid loss, with a bias.
    """

    vision_args: dict
    text_args: dict
    dtype: str = "float32"
    sigmoid: bool = False

    llm_args = None  # as of a FastVLM without a language model, which answers no question

    def setup(self):
        self.vision, self.text = make_encoder(**self.vision_args), TextTower(**self.text_args)
        if not isinstance(self.vision, FastViT):
            self.image_head = Dense(self.text.features, use_bias=False, init_std=self.vision.features**-0.5)
        for name, value in initial_logits(self.sigmoid).items():
            setattr(self, name, self.param(name, nn.initializers.constant(value), (), jnp.float32))

    def __call__(self, images: Array, tokens_BT: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Returns the embeddings of images [G, N, H, W, 3] and of texts [B, T]: [G * N, F] and [B, F]."""
        return self.embed_images(images, train=train), self.embed_texts(tokens_BT)

    def embed_images(self, images: Array, image_mask: Array | None = None, *, train: bool = False) -> Array:
        """Returns the embeddings of images [G, N, H, W, 3], float32 [G * N, F] of length 1.

        Raises:
          ValueError: the encoder has no CLIP projection, or one of another width than the text tower's.
        """
        x = normalised(images, self.vision.image_mean, self.vision.image_std, jnp.dtype(self.dtype))
        mask = None if image_mask is None else image_mask.reshape(-1)
        if isinstance(self.vision, FastViT):
            if self.vision.head_features != self.text.features:
                raise ValueError(
                    f"model.vision.head_features={self.vision.head_features} must be {self.text.features}, the width "
                    "of the text tower's embeddings: set it so, or give an encoder with such a CLIP projection"
                )
            return unit(self.vision(x, mask, train=train, embed=True))
        return unit(self.image_head(jnp.mean(self.vision(x, mask, train=train), axis=(1, 2))))

    def embed_texts(self, tokens_BT: Array) -> Array:
        """Returns the embeddings of texts, int32 [B, context_length], float32 [B, F] of length 1."""
        return unit(self.text(tokens_BT, jnp.dtype(self.dtype)))


def init_variables(model: CLIP, rng: Array) -> dict[str, Any]:
    """Returns randomly initialized variables, boxed with their logical axes; no shape depends on the batch."""
    vision = make_encoder(**model.vision_args)
    side = getattr(vision, "image_size", None) or vision.stride
    images = jnp.zeros((1, 1, side, side, 3), jnp.uint8)
    tokens = jnp.zeros((1, TextTower(**model.text_args).context_length), jnp.int32)
    return model.init(rng, images, tokens)


def initial_logits(sigmoid: bool) -> dict[str, float]:
    """Returns `logit_scale` and, for a sigmoid loss, `logit_bias`, as a model starts with them."""
    if sigmoid:
        return {"logit_scale": math.log(SIGMOID_SCALE), "logit_bias": SIGMOID_BIAS}
    return {"logit_scale": math.log(SCALE)}


def unit(x: Array) -> Array:
    """Returns vectors [B, F] of length 1, in float32 (float64 for float64); a vector of zeros stays one."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)


def clamped(logit_scale: Array) -> Array:
    """Returns the parameter `logit_scale` as it may be behind a step: from 0 to ln 100.

    CLIP clamps it after the step and not in the forward pass, so that it has a gradient at either end too.
    """
    return jnp.clip(logit_scale, 0.0, MOST)


def build(vision: dict, text: dict, dtype: str = "float32", sigmoid: bool = False) -> CLIP:
    """Builds the model of a config. Lists become tuples, so that the modules can be hashed."""
    parts = ({k: tuple(v) if isinstance(v, list) else v for k, v in dict(args).items()} for args in (vision, text))
    return CLIP(*map(flax.core.freeze, parts), dtype, sigmoid)
