"""Reads the CLIP models of ml-mobileclip: model.safetensors beside that repository's config of the size.

mobileclip_s2.json     ml-mobileclip's own file, copied from its folder mobileclip/configs
model.safetensors      the tensors of its mobileclip_s2.pt
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.layouts.timm_args import image_statistics, read_timm_args
from fastvlm_jax.convert.mapping import described, to_jax
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.squeezed import squeezed
from fastvlm_jax.convert.tables import apple, text_tower
from fastvlm_jax.convert.weight_files import MOBILECLIP_CONFIG, open_weights, read_json
from fastvlm_jax.images.decode import MAX_SIDE
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.text_tower import TextTower

IMAGE, TEXT = "image_encoder.model.", "text_encoder."
IMAGE_TOWERS = ("mci0", "mci1", "mci2")
# Its key -> our argument.
SIZES = {
    "dim": "width",
    "n_transformer_layers": "num_layers",
    "n_heads_per_layer": "num_heads",
    "vocab_size": "vocab_size",
    "context_length": "context_length",
}
# Keys that choose what the text tower computes -> the values that are computed here.
COMPUTED = {
    "model_name": ("base",), "causal_masking": (False,), "ffn_multiplier_per_layer": (4.0,),
    "norm_layer": ("layer_norm", "layer_norm_fp32"),
}  # fmt: skip
UNUSED = ("no_scale_embedding", "embed_dropout")


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a CLIP of ml-mobileclip: ({"vision": ..., "text": ..., "sigmoid": False, "dtype": ...}, Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    (file,) = source.glob(MOBILECLIP_CONFIG)
    config = read_json(file)
    for key in ("image_cfg", "text_cfg"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{file}: {key} is missing or not an object: copy ml-mobileclip's file of this size again")
    name = config["image_cfg"].get("model_name")
    if name not in IMAGE_TOWERS:
        raise ValueError(
            f"{file}: image_cfg.model_name is {name!r}, this package has {', '.join(IMAGE_TOWERS)}: "
            "use MobileCLIP-S1, -S2 or a MobileCLIP2-S"
        )
    text = _text(file, config)
    tensors = with_usual_prefix(open_weights(source), "embedding_layer.weight", TEXT, source)
    vision = read_timm_args(file, "image_cfg.", f"fastvit_{name}", {})
    vision["form"] = "folded" if any("reparam" in name for name in tensors) else "branched"
    # ml-mobileclip's images are in [0, 1].
    vision |= {"head_features": config.get("embed_dim"), "head_bias": False, **image_statistics(None, {})}
    model_config = {"vision": vision, "text": text, "sigmoid": False, "dtype": "float32"}
    model, shapes = described(model_config, file)
    rows = [
        *apple.tower_rows(fastvlm.make_encoder(**model.vision_args), IMAGE),
        *apple.text_rows(TextTower(**model.text_args), TEXT),
        *text_tower.logit_rows(False),
    ]
    tensors = squeezed(squeezed(tensors, 2, TEXT + apple.POSITIONS), 0, *text_tower.LOGITS)
    return model_config, to_jax(rows, tensors, shapes, source)


def image_settings(source: pathlib.Path) -> tuple[int, str]:
    """Returns (side of the square that the image tower sees, pixels; "crop": how images are fitted into it).

    Raises:
      ValueError: the config gives no side.
    """
    (file,) = source.glob(MOBILECLIP_CONFIG)
    side = read_json(file)["image_cfg"].get("image_size")
    if type(side) is not int or not 0 < side <= MAX_SIDE:
        raise ValueError(f"{file}: image_cfg.image_size is {side!r}, it must be the side of a square")
    return side, "crop"


def _text(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of TextTower; raises ValueError for a tower that this package does not have."""
    text = config["text_cfg"]
    if text.get("model_name") == "mct":
        raise ValueError(
            f"{file}: text_cfg.model_name is 'mct', the text tower of MobileCLIP-S0, which this package does not have: "
            "use MobileCLIP2-S0, whose text tower it has"
        )
    if missing := sorted({*SIZES, *COMPUTED} - set(text)):
        raise ValueError(f"{file}: text_cfg.{missing[0]} is missing: copy ml-mobileclip's file of this size again")
    for key, values in COMPUTED.items():
        if text[key] not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(
                f"{file}: text_cfg.{key} is {text[key]!r}, this package computes {known} alone: "
                "use MobileCLIP-S1, -S2 or a MobileCLIP2-S"
            )
    if unknown := sorted(set(text) - {*SIZES, *COMPUTED, *UNUSED}):
        raise ValueError(f"{file}: text_cfg.{unknown[0]} asks for a text tower that this package does not have")
    return {"features": config.get("embed_dim"), **{ours: text[theirs] for theirs, ours in SIZES.items()}}
