"""Reads and writes transformers directories that hold a CLIP or SigLIP image tower, and their config.json."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.layouts.timm_args import image_statistics
from fastvlm_jax.convert.mapping import described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.tables import vit
from fastvlm_jax.convert.weight_files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.sizes import CLIP_COLOURS, SIGLIP_COLOURS
from fastvlm_jax.models.vit import ACTIVATIONS, ViT

PREPROCESSOR = "preprocessor_config.json"


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads the image tower of a CLIP or SigLIP directory: ({"vision": ..., "dtype": ...}, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    vision = read_vision_config(source / CONFIG, read_json(source / CONFIG))
    if (source / PREPROCESSOR).is_file():
        vision |= image_statistics(_renamed(read_json(source / PREPROCESSOR)), vision)
    model_config = {"vision": vision, "dtype": "float32"}
    model, shapes = described(model_config, source / CONFIG)
    tower = fastvlm.make_encoder(**model.vision_args)
    tensors = {name: x for name, x in open_weights(source).items() if not vit.is_beside_tower(tower, name)}
    rows = vit.tower_rows(tower, vit.tower_prefix(tensors))
    return model_config, to_jax(rows, tensors, shapes, source)


def write(folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, dtype: str | None) -> None:
    """Writes a directory for transformers' `CLIPVisionModel` or `SiglipVisionModel`, with its image settings.

    Args:
      folder: an existing folder.
      model_config, variables: an encoder alone.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: the tower mixes CLIP and SigLIP, or the variables belong to another model.
    """
    model = fastvlm.build(vision=model_config["vision"])
    vision = fastvlm.make_encoder(**model.vision_args)
    config = vision_config(vision)
    stored = save_weights(
        folder, to_torch(vit.tower_rows(vision, vit.PUBLISHED_PREFIX), variables, shapes_of(model)), dtype
    )
    name = "CLIPVisionModel" if config["model_type"] == "clip_vision_model" else "SiglipVisionModel"
    write_json(folder / CONFIG, {"architectures": [name], "dtype": stored, **config})
    side = {"height": vision.image_size, "width": vision.image_size}
    images = {
        "image_processor_type": "CLIPImageProcessor" if vision.cls_token else "SiglipImageProcessor",
        "size": {"shortest_edge": vision.image_size} if vision.cls_token else side,
        "crop_size": side,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    write_json(folder / PREPROCESSOR, images)


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns image_mean and image_std under timm's keys, as `image_statistics` reads them."""
    return {"mean": settings.get("image_mean"), "std": settings.get("image_std")}


# Our argument -> transformers' key, CLIP's default and SigLIP's; SigLIP's published config.json omits keys.
SIZES = {
    "image_size": ("image_size", 224, 224),
    "patch_size": ("patch_size", 32, 16),
    "width": ("hidden_size", 768, 768),
    "num_layers": ("num_hidden_layers", 12, 12),
    "num_heads": ("num_attention_heads", 12, 12),
    "mlp_dim": ("intermediate_size", 3072, 3072),
}
KINDS = {
    "clip_vision_model": dict(
        activation="quick_gelu",
        epsilon=1e-5,
        cls_token=True,
        pre_norm=True,
        pooling_head=False,
        **CLIP_COLOURS,
    ),
    "siglip_vision_model": dict(
        activation="gelu_pytorch_tanh",
        epsilon=1e-6,
        cls_token=False,
        pre_norm=False,
        pooling_head=True,
        **SIGLIP_COLOURS,
    ),
}


def vision_config(vision: ViT) -> dict[str, Any]:
    """Returns the config.json of a CLIPVisionModel or SiglipVisionModel, also the `vision_config` of a whole model.

    It cannot hold select_layer, image_mean, image_std and the training arguments.

    Raises:
      ValueError: the tower mixes CLIP and SigLIP, so that neither class computes it.
    """
    model_type = "clip_vision_model" if vision.cls_token else "siglip_vision_model"
    if vision.pre_norm != vision.cls_token or (vision.cls_token and vision.pooling_head):
        raise ValueError(
            f"vision.cls_token={vision.cls_token}, pre_norm={vision.pre_norm}, pooling_head={vision.pooling_head} has "
            "no transformers layout: CLIP is True, True, False; SigLIP False, False, True or False"
        )
    head = {} if vision.cls_token else {"vision_use_head": vision.pooling_head}
    return {
        "model_type": model_type,
        **{key: getattr(vision, ours) for ours, (key, *_) in SIZES.items()},
        "num_channels": 3,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.epsilon,
        "attention_dropout": 0.0,
        **head,
    }


def read_vision_config(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the encoder arguments (with "family") from the config.json of a tower or of a whole CLIP or SigLIP model.

    image_mean and image_std are those of OpenAI's CLIP or of SigLIP; preprocessor_config.json may override them.

    Args:
      file: where `config` comes from, for messages.
      config: the parsed config.json, or the `vision_config` in it.

    Raises:
      ValueError: a key is wrong or has a value that this package does not compute; the message names file and key.
    """
    prefix = ""
    if (whole := config.get("model_type")) in ("clip", "siglip"):
        prefix = "vision_config."
        config = {"model_type": f"{whole}_vision_model", **_nested(file, config)}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{file}: {prefix}model_type is {kind!r}, it must be one of {', '.join(KINDS)}")
    args = {"family": "vit", **KINDS[kind]}
    for ours, (key, clip, siglip) in SIZES.items():
        args[ours] = config.get(key, clip if kind == "clip_vision_model" else siglip)
        if type(args[ours]) is not int or args[ours] < 1:
            raise ValueError(f"{file}: {prefix}{key} is {args[ours]!r}, it must be a positive whole number")
    args["activation"] = config.get("hidden_act", args["activation"])
    if not isinstance(args["activation"], str) or args["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"{file}: {prefix}hidden_act is {args['activation']!r}, this package computes {', '.join(ACTIVATIONS)}"
        )
    args["epsilon"] = config.get("layer_norm_eps", args["epsilon"])
    if type(args["epsilon"]) is not float or not 0 < args["epsilon"] < 1:
        raise ValueError(f"{file}: {prefix}layer_norm_eps is {args['epsilon']!r}, it must lie between 0 and 1")
    if kind == "siglip_vision_model":
        args["pooling_head"] = config.get("vision_use_head", True)
    allowed = {"vision_use_head": (True, False), "num_channels": (3,), "attention_dropout": (0.0,)}
    for key, values in allowed.items():
        if (found := config.get(key, values[0])) not in values:
            raise ValueError(f"{file}: {prefix}{key} is {found!r}, this package computes {values[0]!r} only")
    return args


def _nested(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `vision_config` of a whole model's config.json; an absent one is empty."""
    if not isinstance(nested := config.get("vision_config", {}), dict):
        raise ValueError(f"{file}: vision_config is {nested!r}, it must be an object")
    return nested
