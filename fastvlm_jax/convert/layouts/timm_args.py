"""Translates a tower to and from timm's description: an architecture's name, and the arguments that differ from it.

On import, a projection's sizes are read from the tensors, image mean and std from the preprocessing settings.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.sizes import VISION_SIZES

ARCHITECTURES = {
    **{f"fastvit_mci{i}": VISION_SIZES[f"mci{i}"] for i in range(5)},
    "convnext_large": VISION_SIZES["convnext_l"],
    "convnext_xxlarge": VISION_SIZES["convnext_xxl"],
}
# Attributes that an architecture fixes; arguments can change its layers and widths.
FIXED = {"fastvit": ("mixers", "stem_scale", "attention_norm"), "convnext": ("epsilon",)}
# timm's argument -> ours; a FastViT of fewer stages takes the first of its architecture's values.
FASTVIT_ARGS = {"layers": "layers", "embed_dims": "embed_dims", "token_mixers": "mixers"}
CONVNEXT_ARGS = {"depths": "layers", "dims": "embed_dims"}
# Arguments that import ignores: they do not change the feature map in inference.
TRAINING_ONLY = ("layer_scale_init_value", "ls_init_value", "drop_path_rate", "proj_drop_rate", "drop_rate")
HEAD_ONLY = ("num_classes", "global_pool")


def timm_args(vision: nn.Module) -> tuple[str, dict[str, Any]]:
    """Returns the name of timm's architecture for `vision`, and the fewest arguments that turn it into `vision`.

    Raises:
      ValueError: no architecture of timm can be turned into `vision`.
    """
    family = "convnext" if isinstance(vision, ConvNeXt) else "fastvit"
    if not isinstance(vision, FastViT | ConvNeXt):
        raise ValueError(
            f"only a FastViT or a ConvNeXt can be written under timm's names, not a {type(vision).__name__}: "
            "use --layout hf"
        )
    if family == "fastvit" and vision.multiscale:
        raise ValueError("timm cannot express model.vision.multiscale: use --layout native")
    best = None
    for name, sizes in ARCHITECTURES.items():
        if sizes.get("family", "fastvit") != family:
            continue
        base = fastvlm.make_encoder(**sizes)
        stages = len(vision.layers)
        if stages > len(base.layers) or any(
            _cut(base, key, stages) != _cut(vision, key, stages) for key in FIXED[family]
        ):
            continue
        args = {
            theirs: list(getattr(vision, ours))
            for theirs, ours in (FASTVIT_ARGS if family == "fastvit" else CONVNEXT_ARGS).items()
            if list(getattr(vision, ours)) != list(getattr(base, ours)) and ours != "mixers"
        }
        if family == "fastvit":
            if vision.mlp_ratio != base.mlp_ratio:
                args["mlp_ratios"] = [vision.mlp_ratio] * stages
            if set(vision.se_stages) != set(base.se_stages):
                args["se_downsamples"] = [i in vision.se_stages for i in range(stages)]
            if vision.form == "folded":
                args["inference_mode"] = True
        if best is None or len(args) < len(best[1]):
            best = name, args
    if best is None:
        wrong = ", ".join(f"{key}={getattr(vision, key)!r}" for key in FIXED[family])
        raise ValueError(f"timm has no architecture with model.vision {wrong}: use --layout native")
    return best


def _cut(vision: nn.Module, key: str, stages: int):
    """Returns an attribute; if it has one value per stage, those of the first `stages` stages."""
    value = getattr(vision, key)
    return tuple(value)[:stages] if isinstance(value, list | tuple) else value


def read_timm_args(file: pathlib.Path, prefix: str, architecture: Any, args: Any) -> dict[str, Any]:
    """Returns the encoder arguments that describe an architecture of timm with its `model_args`.

    Args:
      file: where the values come from, for messages.
      prefix: what precedes the keys in messages, such as "vision_config.".
      architecture: name of the architecture; a tag after a dot is ignored.
      args: the `model_args`.

    Raises:
      ValueError: a key describes a tower that this package does not have; the message names it.
    """
    if not isinstance(architecture, str) or architecture.partition(".")[0] not in ARCHITECTURES:
        raise ValueError(
            f"{file}: {prefix}architecture is {architecture!r}, this package has {', '.join(ARCHITECTURES)}"
        )
    sizes = ARCHITECTURES[architecture.partition(".")[0]]
    if not isinstance(args, dict):
        raise ValueError(f"{file}: {prefix}model_args is {args!r}, it must be an object")
    args = {key: value for key, value in args.items() if key not in TRAINING_ONLY + HEAD_ONLY}
    if args.get("in_chans") == 3:
        del args["in_chans"]
    vision = {key: list(x) if isinstance(x, tuple) else x for key, x in sizes.items()}
    vision = {key: x for key, x in vision.items() if key not in ("image_mean", "image_std")}
    where = f"{file}: {prefix}model_args"
    if sizes.get("family") == "convnext":
        vision |= {ours: args.pop(theirs) for theirs, ours in CONVNEXT_ARGS.items() if theirs in args}
    else:
        base = fastvlm.make_encoder(**sizes)
        vision |= {ours: args.pop(theirs, list(getattr(base, ours))) for theirs, ours in FASTVIT_ARGS.items()}
        ratios = args.pop("mlp_ratios", [base.mlp_ratio])
        squeeze = args.pop("se_downsamples", [i in base.se_stages for i in range(len(base.layers))])
        if not isinstance(ratios, list) or len(set(map(str, ratios))) != 1 or type(ratios[0]) not in (int, float):
            raise ValueError(f"{where}.mlp_ratios is {ratios!r}, this package has one ratio for all stages")
        if not all(isinstance(x, list) for x in (squeeze, vision["layers"], vision["embed_dims"], vision["mixers"])):
            raise ValueError(f"{where} has a per-stage setting that is not a list")
        stages = len(vision["layers"])
        vision["embed_dims"], vision["mixers"] = vision["embed_dims"][:stages], vision["mixers"][:stages]
        vision["mlp_ratio"] = float(ratios[0])
        vision["se_stages"] = [i for i, used in enumerate(squeeze[:stages]) if used]
        vision["form"] = "folded" if args.pop("inference_mode", False) else "branched"
        if tuple(vision["mixers"]) != tuple(base.mixers)[:stages]:
            args["token_mixers"] = vision["mixers"]  # refused below: timm would put positional encodings elsewhere
    if args:
        raise ValueError(f"{where}.{next(iter(args))} asks for a tower that this package does not have")
    return vision


def head_of(tensors: Mapping, name: str) -> dict[str, Any]:
    """Returns the FastViT arguments of the CLIP projection stored under the prefix `name`; {} if there is none."""
    if f"{name}weight" not in tensors:
        return {}
    shape = tensors[f"{name}weight"].get_shape()
    return {"head_features": int(shape[0]) if shape else 0, "head_bias": f"{name}bias" in tensors}


def projection_of(tensors: Mapping, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the ConvNeXt arguments of the CLIP projection, whose layers are the `names` that the checkpoint holds."""
    stored = [name for name in names if f"{name}.weight" in tensors]
    if not stored:
        return {"projection": []}
    widths = [int((tensors[f"{name}.weight"].get_shape() or [0])[0]) for name in stored]
    return {"projection": widths, "projection_bias": f"{stored[-1]}.bias" in tensors}


def image_statistics(settings: Any, default: Mapping[str, Any]) -> dict[str, list[float]]:
    """Returns image_mean and image_std, three numbers each for images in [0, 1].

    Args:
      settings: the preprocessing settings with "mean" and "std"; a value that is not three numbers is ignored.
      default: the image_mean and image_std to use instead; without them 0 and 1.
    """
    settings = settings if isinstance(settings, dict) else {}
    zeros_ones = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    found = {}
    for key, fallback in zeros_ones.items():
        value = settings.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            value = default.get(f"image_{key}", fallback)
        found[f"image_{key}"] = [float(x) for x in value]
    return found
