"""Adapts an encoder's CLIP projection to a layout: adds a bias, removes the projection, or asks for one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvlm_jax.models.text_tower import TextTower


def with_head_bias(model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """Adds a bias of zeros to a FastViT's CLIP projection if it has none: timm's has a bias, Apple's does not.

    Returns:
      (model_config, variables); the given ones where there is nothing to add.
    """
    vision = model_config["vision"]
    if not vision.get("head_features") or vision.get("head_bias"):
        return model_config, variables
    tower = variables["params"]["vision"]
    bias = np.zeros(vision["head_features"], tower["head"]["kernel"].dtype)
    params = {**variables["params"], "vision": {**tower, "head": {**tower["head"], "bias": bias}}}
    return {**model_config, "vision": {**vision, "head_bias": True}}, {**variables, "params": params}


def without_projection(model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """Removes a ConvNeXt's CLIP projection if its last layer has no bias, as open_clip's: timm's head requires one.

    Returns:
      (model_config, variables) of the encoder alone; the given ones where there is nothing to remove.
    """
    vision = model_config["vision"]
    if not vision.get("projection") or vision.get("projection_bias"):
        return model_config, variables
    tower = variables["params"]["vision"]
    params = {"vision": {**tower, "unused": {"norm": tower["unused"]["norm"]}}}
    return {**model_config, "vision": {**vision, "projection": []}}, {**variables, "params": params}


def without_head(model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """Removes the CLIP projection of a model's FastViT, which a VLM does not compute.

    Returns:
      (model_config, variables); the given ones where there is nothing to remove.
    """
    vision = dict(model_config["vision"])
    if not vision.get("head_features"):
        return model_config, variables
    params = {**variables["params"], "vision": dict(variables["params"]["vision"])}
    del params["vision"]["head"]
    return {**model_config, "vision": {**vision, "head_features": 0}}, {**variables, "params": params}


def require_projection(model_config: Mapping[str, Any], variables: dict, source: str) -> None:
    """Raises ValueError if the encoder of a CLIP, put together from parts, has no projection to its texts' width.

    Args:
      source: where the CLIP comes from, for the message.
    """
    vision, width = model_config["vision"], model_config["text"].get("features", TextTower.features)
    if vision.get("family", "fastvit") == "fastvit":
        missing = vision.get("head_features", 0) != width
    else:
        missing = "image_head" not in variables["params"]
    if missing:
        raise ValueError(
            f"the encoder of {source} has no CLIP projection to {width}, the width of its texts' embeddings: train one "
            "with it as --config.parent of a CLIP stage"
        )
