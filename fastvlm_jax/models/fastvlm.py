"""The FastVLM model: a decoder reads projected image features among its token embeddings (paper, Figure 2).

Legend: G groups, N image slots per group, R rows per group, T text positions, L features per image, D decoder width,
C encoder channels, V vocabulary.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.models import decoder
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.decoder import Cache, Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.projector import Projector
from fastvlm_jax.models.vit import ViT
from fastvlm_jax.sharding import constrain

Array = jax.Array
FAMILIES = {"fastvit": FastViT, "vit": ViT, "convnext": ConvNeXt}


def make_encoder(family: str = "fastvit", **sizes) -> nn.Module:
    """Returns the encoder that `vision_args` describe.

    Args:
      family: a name in FAMILIES.
      **sizes: constructor arguments of that class.

    Raises:
      ValueError: the family is not in FAMILIES.
    """
    if family not in FAMILIES:
        raise ValueError(f"model.vision.family={family!r} must be one of {', '.join(FAMILIES)}")
    return FAMILIES[family](**sizes)


def normalised(images: Array, mean: Sequence[float], std: Sequence[float], dtype) -> Array:
    """Returns images [G, N, H, W, 3], uint8 or in [0, 1], as an encoder reads them: [G * N, H, W, 3] in `dtype`."""
    shift = any(mean) or any(x != 1 for x in std)
    # Each step in bfloat16 would round: together they would move a colour by up to 1.4 of 255.
    precise = jnp.dtype(jnp.float32) if shift else dtype
    if images.dtype == jnp.uint8:
        images = images.astype(precise) / 255
    images = constrain(images.astype(precise).reshape(-1, *images.shape[2:]), ("batch", None, None, None))
    return ((images - jnp.asarray(mean, precise)) / jnp.asarray(std, precise)).astype(dtype) if shift else images


class FastVLM(nn.Module):
    """Computes logits or losses of text that refers to images; parameters are under `vision/`, `projector/` and `llm/`.

    Without `llm_args` the model is only an encoder (call `encode`), without `vision_args` only a language model.

    Attributes:
      vision_args: "family" (a name in FAMILIES; the default is fastvit) and constructor arguments of the encoder.
      llm_args: constructor arguments of Decoder.
      dtype: dtype of the computation, independent of the dtype of the parameters.
    """

    vision_args: dict | None
    llm_args: dict | None
    dtype: str = "float32"

    def setup(self):
        if self.vision_args is not None:
            self.vision = make_encoder(**self.vision_args)
        if self.llm_args is not None:
            self.llm = Decoder(**self.llm_args)
        if self.vision_args is not None and self.llm_args is not None:
            self.projector = Projector(self.llm_args["width"], self.llm_args.get("init_std", 0.02))

    def tokens_per_image(self, height: int, width: int | None = None) -> int:
        """Returns the number of features, and so of placeholder tokens, of one image.

        Args:
          height, width: image size in pixels; without `width` the image is square.

        Raises:
          ValueError: the encoder does not accept this image size.
        """
        rows, columns = make_encoder(**self.vision_args, parent=None).grid(height, width or height)
        return rows * columns

    def __call__(
        self, images, tokens, image_index, positions, segment_ids, image_mask=None, targets=None, *, train=False
    ) -> Array:
        """Returns logits [G, R, T, V] from the fields of a Batch, which batch.py describes.

        Inputs without the group axis count as one group and give logits [R, T, V].

        Args:
          images: uint8, or floats that are already in [0, 1].
          targets: if given, the result is the loss of each token, float32 [G, R, T], and the logits are never stored.
          train: whether BatchNorm uses and updates batch statistics, in an encoder with batch_norm="train".
        """
        if tokens.ndim == 2:
            mask = None if image_mask is None else image_mask[None]
            args = jax.tree.map(lambda x: x[None], (images, tokens, image_index, positions, segment_ids))
            return self(*args, mask, None if targets is None else targets[None], train=train)[0]
        G, R, T = tokens.shape
        features = None if self.vision_args is None else self.encode(images, image_mask, train=train)
        out = self.decode(features, tokens, image_index, positions, segment_ids, targets)
        return out.reshape(G, R, T, *out.shape[2:])

    def encode(self, images: Array, image_mask: Array | None = None, *, train: bool = False) -> Array:
        """Encodes images [G, N, H, W, 3] to the features that the decoder reads, [G, N * L, D].

        Without a language model, returns the encoder's own features [G, N * L, C].
        """
        G, N = images.shape[:2]
        images = normalised(images, self.vision.image_mean, self.vision.image_std, jnp.dtype(self.dtype))
        mask = None if image_mask is None else image_mask.reshape(G * N)
        features = self.vision(images, mask, train=train)
        features = features.reshape(G, -1, features.shape[-1])
        return features if self.llm_args is None else self.projector(features)

    def embed(self, features: Array | None, tokens: Array, image_index: Array) -> Array:
        """Returns the embeddings of rows [G, R, T] as [G * R, T, D]; where image_index >= 0, image features.

        Args:
          features: image features [G, N * L, D], or None for text only.
          tokens, image_index: fields of a Batch, [G, R, T].
        """
        G, R, T = tokens.shape
        x = self.llm.embed(tokens, jnp.dtype(self.dtype))
        if features is not None:
            index = jnp.maximum(image_index, 0).reshape(G, R * T, 1)
            placed = jnp.take_along_axis(features, index, axis=1).reshape(x.shape)
            x = jnp.where(image_index[..., None] >= 0, placed, x)
        return constrain(x.reshape(G * R, T, -1), ("batch", None, None))

    def decode(self, features, tokens, image_index, positions, segment_ids, targets=None) -> Array:
        """Runs the decoder on rows [G, R, T]: logits [G * R, T, V], or with targets losses [G * R, T].

        Args:
          features: image features [G, N * L, D], or None for text only.
          tokens, image_index, positions, segment_ids: fields of a Batch, [G, R, T].
          targets: int32 [G, R, T]; if given, losses are returned instead of logits.
        """
        x = self.embed(features, tokens, image_index)
        targets = None if targets is None else targets.reshape(x.shape[:2])
        return self.llm(x, positions.reshape(x.shape[:2]), segment_ids.reshape(x.shape[:2]), targets)

    def extend(
        self, features, tokens, image_index, positions, segment_ids, cache: Cache, further: bool = False
    ) -> tuple[Array, Cache]:
        """Runs the decoder on a prompt or on further tokens of each row: (logits [G * R, V], the longer cache).

        Args:
          features, tokens, image_index, positions, segment_ids: see `decode`.
          cache, further: KV cache of the earlier tokens, and whether several tokens go on from it; see
            `Decoder.extend`.
        """
        x = self.embed(features, tokens, image_index)
        return self.llm.extend(x, positions.reshape(x.shape[:2]), segment_ids.reshape(x.shape[:2]), cache, further)

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """Returns an empty KV cache for `rows` rows of `slots` tokens each, in the dtype of the computation."""
        return self.llm.empty_cache(rows, slots, jnp.dtype(self.dtype))


def build(vision: dict | None = None, llm: dict | None = None, dtype: str = "float32") -> FastVLM:
    """Builds the model of a config: `build(**config.model)`. Lists become tuples, so that the modules can be hashed."""

    def frozen(args: dict) -> dict:
        return {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in dict(args).items()}

    vision, llm = (None if not args else flax.core.freeze(frozen(args)) for args in (vision, llm))
    return FastVLM(vision, llm, dtype)


def init_variables(model: FastVLM, rng: Array) -> dict[str, Any]:
    """Returns randomly initialized variables, boxed with their logical axes; no shape depends on the batch."""
    images = None
    if model.vision_args is not None:
        vision = make_encoder(**model.vision_args)
        side = getattr(vision, "image_size", None) or vision.stride
        images = jnp.zeros((1, 1, side, side, 3), jnp.uint8)
    if model.llm_args is None:
        return model.init(rng, images, method="encode")
    text = jnp.zeros((1, 1, 1), jnp.int32)
    return model.init(rng, images, text, text, text, text)


def unstacked(model: FastVLM, collection: dict[str, Any], index: Callable = operator.getitem) -> dict[str, Any]:
    """Returns a collection of variables in which the decoder's layers, if it has them, are arrays of their own.

    Generation is fastest so; see `decoder.unstacked`, also for `index`.
    """
    if "llm" not in collection:
        return collection
    layers = decoder.unstacked(collection["llm"]["layers"], model.llm_args["num_layers"], index)
    return {**collection, "llm": {**collection["llm"], "layers": layers}}
