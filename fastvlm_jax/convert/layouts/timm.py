"""Reads and writes timm directories that hold a FastViT or a ConvNeXt alone."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fastvlm_jax.convert.heads import with_head_bias, without_projection
from fastvlm_jax.convert.layouts.timm_args import (
    ARCHITECTURES,
    head_of,
    image_statistics,
    projection_of,
    read_timm_args,
    timm_args,
)
from fastvlm_jax.convert.mapping import Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.tables import convnext, timm
from fastvlm_jax.convert.tables.timm import FIRST_MLP
from fastvlm_jax.convert.weight_files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.fastvit import FastViT


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a directory that timm loads with `local-dir:`: ({"vision": ..., "dtype": ...}, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    file, config, tensors = source / CONFIG, read_json(source / CONFIG), open_weights(source)
    tensors = with_usual_prefix(tensors, FIRST_MLP, "", source)
    vision = read_timm_args(file, "", config.get("architecture"), config.get("model_args") or {})
    if "form" in vision:
        vision["form"] = "folded" if any("reparam_conv" in name for name in tensors) else "branched"
        vision |= head_of(tensors, "head.fc.")
    else:
        vision |= projection_of(tensors, ("head.pre_logits.fc", "head.fc"))
    vision |= image_statistics(config.get("pretrained_cfg"), ARCHITECTURES[config["architecture"].partition(".")[0]])
    model_config = {"vision": vision, "dtype": "float32"}
    model, shapes = described(model_config, file)
    return model_config, to_jax(_rows(fastvlm.make_encoder(**model.vision_args)), tensors, shapes, source)


def _rows(vision: nn.Module) -> list[Row]:
    return (convnext if isinstance(vision, ConvNeXt) else timm).tower_rows(vision)


def write(folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, dtype: str | None) -> None:
    """Writes weights and config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
      folder: an existing folder.
      model_config, variables: an encoder alone.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: timm has no such architecture, or the variables belong to another model.
    """
    model_config, variables = with_head_bias(*without_projection(model_config, variables))
    model = fastvlm.build(vision=model_config["vision"])
    vision = fastvlm.make_encoder(**model.vision_args)
    architecture, args = timm_args(vision)
    save_weights(folder, to_torch(_rows(vision), variables, shapes_of(model)), dtype)
    classes = vision.head_features if isinstance(vision, FastViT) else (*vision.projection, 0)[0]
    settings = {
        "input_size": [3, 256, 256],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": list(vision.image_mean),
        "std": list(vision.image_std),
        "num_classes": classes,
        "classifier": "head.fc",
        "first_conv": "stem.0" if isinstance(vision, ConvNeXt) else "stem.0.conv_kxk.0.conv",
    }
    config = {"architecture": architecture, "num_classes": classes, "num_features": vision.features}
    write_json(folder / CONFIG, {**config, "model_args": args, "pretrained_cfg": settings})
