"""Reads and writes the image tower of open_clip directories; their text tower is ignored."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fastvlm_jax.convert.heads import with_head_bias
from fastvlm_jax.convert.layouts.timm_args import head_of, image_statistics, projection_of, read_timm_args, timm_args
from fastvlm_jax.convert.mapping import Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.tables import convnext, timm
from fastvlm_jax.convert.tables.timm import FIRST_MLP
from fastvlm_jax.convert.weight_files import OPEN_CLIP_CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.sizes import VISION_SIZES

TRUNK = "visual.trunk."
# Config of the text tower that open_clip pairs with ConvNeXt-L, with ConvNeXt-XXL, and with MobileCLIP's image towers.
L_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 16}
XXL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12, "no_causal_mask": True}


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads the image tower of an open_clip directory: ({"vision": ..., "dtype": ...}, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    file, config = source / OPEN_CLIP_CONFIG, read_json(source / OPEN_CLIP_CONFIG)
    tower = config.get("model_cfg")
    tower = tower.get("vision_cfg") if isinstance(tower, dict) else None
    if not isinstance(tower, dict):
        raise ValueError(f"{file}: model_cfg.vision_cfg is missing or not an object")
    stored = with_usual_prefix(open_weights(source, "open_clip_model"), FIRST_MLP, TRUNK, source)
    tensors = {name: x for name, x in stored.items() if name.startswith("visual.")}
    vision = read_timm_args(file, "model_cfg.vision_cfg.", tower.get("timm_model_name"), {})
    if "form" in vision:
        vision["form"] = "folded" if any("reparam_conv" in name for name in tensors) else "branched"
        vision |= head_of(tensors, f"{TRUNK}head.fc.")
    else:
        vision |= projection_of(tensors, ("visual.head.proj", "visual.head.mlp.fc1", "visual.head.mlp.fc2"))
    # open_clip's default mean and std are OpenAI's, as mci4's.
    vision |= image_statistics(config.get("preprocess_cfg"), VISION_SIZES["mci4"])
    model_config = {"vision": vision, "dtype": "float32"}
    model, shapes = described(model_config, file)
    return model_config, to_jax(_rows(fastvlm.make_encoder(**model.vision_args)), tensors, shapes, source)


def _rows(vision: nn.Module) -> list[Row]:
    return convnext.openclip_rows(vision) if isinstance(vision, ConvNeXt) else timm.tower_rows(vision, TRUNK)


def write(folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, dtype: str | None) -> None:
    """Writes the weights of an open_clip image tower, and the config of the whole CLIP model without text weights.

    Args:
      folder: an existing folder.
      model_config, variables: an encoder alone.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: open_clip has no name for the tower, because its sizes are not published ones.
    """
    model_config, variables = with_head_bias(model_config, variables)
    model = fastvlm.build(vision=model_config["vision"])
    vision = fastvlm.make_encoder(**model.vision_args)
    architecture, args = timm_args(vision)
    if wrong := sorted(set(args) - {"inference_mode"}):
        raise ValueError(
            f"open_clip has a fixed size for each architecture, none with {wrong[0]}={args[wrong[0]]}: "
            "use --layout timm or native"
        )
    tower = {"timm_model_name": architecture, "timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": 0.0}
    if isinstance(vision, ConvNeXt):
        size, projection, text = (
            (256, "linear", XXL_TEXT) if architecture == "convnext_xxlarge" else (320, "mlp", L_TEXT)
        )
        tower |= {"timm_pool": "", "timm_proj": projection, "image_size": size}
        width = vision.projection[-1] if vision.projection else text["width"]
    else:
        tower |= {"timm_pool": "avg", "timm_proj": None, "image_size": 256}
        width, text = vision.head_features or 768, TEXT
    save_weights(folder, to_torch(_rows(vision), variables, shapes_of(model)), dtype, "open_clip_model")
    config = {"embed_dim": width, "vision_cfg": tower, "text_cfg": text, "custom_text": text is TEXT}
    images = {"mean": list(vision.image_mean), "std": list(vision.image_std), "interpolation": "bicubic"}
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": images})
