"""Names encoders and language models by their sizes, as models/sizes.py calls them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvlm import make_encoder
from fastvlm_jax.models.sizes import LLM_SIZES, VISION_SIZES

# Attributes that a name leaves open: they change neither the layers nor their widths.
OPEN = {
    "parent", "name", "form", "batch_norm", "batch_norm_images", "drop_path", "remat", "head_features", "head_bias",
    "init_std", "layer_scale_init", "image_mean", "image_std", "vocab_size", "context_length", "rope_theta", "epsilon",
}  # fmt: skip


def encoder_name(args: Mapping[str, Any]) -> str:
    """Returns the name of an encoder, as "fastvithd"; for one of another size its family, depths and widths."""
    encoder = make_encoder(**args, parent=None)
    for name, sizes in VISION_SIZES.items():
        known = make_encoder(**sizes, parent=None)
        if type(known) is type(encoder) and _sizes(known) == _sizes(encoder):
            return name
    family = args.get("family", "fastvit")
    if family == "vit":
        return f"vit of {encoder.num_layers} layers, {encoder.width} wide"
    return f"{family} of {'-'.join(map(str, encoder.layers))} blocks, {'-'.join(map(str, encoder.embed_dims))} wide"


def llm_name(args: Mapping[str, Any]) -> str:
    """Returns the name of a language model, as "0.5b" or "4 of 24 layers of 0.5b"; for another its depth and width."""
    llm = Decoder(**args, parent=None)
    for name, sizes in LLM_SIZES.items():
        known = Decoder(**sizes, parent=None)
        if _sizes(known) == _sizes(llm):
            return name
        if _sizes(known) == _sizes(llm) | {"num_layers": known.num_layers}:
            return f"{llm.num_layers} of {known.num_layers} layers of {name}"
    return f"decoder of {llm.num_layers} layers, {llm.width} wide"


def _sizes(module: nn.Module) -> dict[str, Any]:
    values = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items() if name not in OPEN}
