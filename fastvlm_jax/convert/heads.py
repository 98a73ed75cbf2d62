"""CLIP projections added to, changed on or taken off an encoder, as a layout asks for them."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def with_head_bias(model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """A FastViT whose CLIP projection has the bias that timm's has, zeros where Apple's has none."""
    vision = model_config["vision"]
    if not vision.get("head_features") or vision.get("head_bias"):
        return model_config, variables
    tower = variables["params"]["vision"]
    bias = np.zeros(vision["head_features"], tower["head"]["kernel"].dtype)
    params = {**variables["params"], "vision": {**tower, "head": {**tower["head"], "bias": bias}}}
    return {**model_config, "vision": {**vision, "head_bias": True}}, {**variables, "params": params}


def without_projection(model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """A ConvNeXt without open_clip's projection, whose last layer has no bias, which timm's head has to have."""
    vision = model_config["vision"]
    if not vision.get("projection") or vision.get("projection_bias"):
        return model_config, variables
    tower = variables["params"]["vision"]
    params = {"vision": {**tower, "unused": {"norm": tower["unused"]["norm"]}}}
    return {**model_config, "vision": {**vision, "projection": []}}, {**variables, "params": params}


def without_head(model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """The model without the CLIP projection of its encoder, which a VLM does not compute."""
    vision = dict(model_config["vision"])
    if not vision.get("head_features"):
        return model_config, variables
    params = {**variables["params"], "vision": dict(variables["params"]["vision"])}
    del params["vision"]["head"]
    return {**model_config, "vision": {**vision, "head_features": 0}}, {**variables, "params": params}
