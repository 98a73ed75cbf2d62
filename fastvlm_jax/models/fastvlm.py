"""FastVLM: FastViTHD features, projected, stand among the token embeddings of a decoder (paper, Figure 2).

Legend: G groups, N image slots a group, R rows a group, T text positions, L features an image, D width, V vocabulary.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.models.decoder import Cache, Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.projector import Projector
from fastvlm_jax.sharding import constrain

Array = jax.Array


class FastVLM(nn.Module):
    """The whole model; parameters lie under `vision/`, `projector/` and `llm/`.

    Attributes:
      vision_args, llm_args: constructor arguments of FastViT and Decoder.
      dtype: dtype of the computation; parameters stay float32.
    """

    vision_args: dict
    llm_args: dict
    dtype: str = "float32"

    def setup(self):
        self.vision = FastViT(**self.vision_args)
        self.projector = Projector(self.llm_args["width"], self.llm_args.get("init_std", 0.02))
        self.llm = Decoder(**self.llm_args)

    @property
    def stride(self) -> int:
        """Pixels a feature covers in each direction: 64 for FastViTHD."""
        return 4 * 2 ** (len(self.vision_args["layers"]) - 1)

    def tokens_per_image(self, image_size: int) -> int:
        """Features (placeholders) of a square image of `image_size` pixels."""
        return (image_size // self.stride) ** 2

    def __call__(self, images, tokens, image_index, positions, segment_ids, image_mask=None, *, train=False) -> Array:
        """Logits [G, R, T, V] of the fields of a Batch; without the group axis, logits [R, T, V].

        Images are uint8, or float already in [0, 1]. `train` uses and updates batch statistics if the encoder says so.
        """
        if tokens.ndim == 2:
            mask = None if image_mask is None else image_mask[None]
            args = jax.tree.map(lambda x: x[None], (images, tokens, image_index, positions, segment_ids))
            return self(*args, mask, train=train)[0]
        G, R, T = tokens.shape
        features = self.encode(images, image_mask, train=train)
        logits, _ = self.decode(features, tokens, image_index, positions, segment_ids)
        return logits.reshape(G, R, T, -1)

    def encode(self, images: Array, image_mask: Array | None = None, *, train: bool = False) -> Array:
        """Image features as the decoder reads them: images [G, N, H, W, 3] -> [G, N * L, D]."""
        G, N, H, W, _ = images.shape
        dtype = jnp.dtype(self.dtype)
        if images.dtype == jnp.uint8:
            images = images.astype(dtype) / 255
        images = constrain(images.astype(dtype).reshape(G * N, H, W, 3), ("batch", None, None, None))
        mask = None if image_mask is None else image_mask.reshape(G * N)
        features = self.vision(images, mask, train=train)
        return self.projector(features.reshape(G, -1, features.shape[-1]))

    def decode(
        self, features, tokens, image_index, positions, segment_ids, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """Logits [G * R, T, V] of rows [G, R, T] that read `features` where image_index >= 0, and the grown cache."""
        G, R, T = tokens.shape
        x = self.llm.embed(tokens, jnp.dtype(self.dtype))
        if features is not None:
            index = jnp.maximum(image_index, 0).reshape(G, R * T, 1)
            placed = jnp.take_along_axis(features, index, axis=1).reshape(x.shape)
            x = jnp.where(image_index[..., None] >= 0, placed, x)
        x = constrain(x.reshape(G * R, T, -1), ("batch", None, None))
        return self.llm(x, positions.reshape(G * R, T), segment_ids.reshape(G * R, T), cache)

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A key-value cache for `rows` rows of `slots` slots, in the dtype of the computation."""
        return self.llm.empty_cache(rows, slots, jnp.dtype(self.dtype))


def build(vision: dict, llm: dict, dtype: str = "float32") -> FastVLM:
    """The model of a config: `build(**config.model)`. Sequences become tuples, so that modules can be hashed."""

    def frozen(args: dict) -> dict:
        return {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in dict(args).items()}

    return FastVLM(flax.core.freeze(frozen(vision)), flax.core.freeze(frozen(llm)), dtype)
