"""Directories that hold an encoder alone: timm's, the image tower of open_clip's, and transformers' CLIP and SigLIP.

timm and open_clip describe a tower by an architecture's name; timm adds the arguments in which it differs from that.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from fastvlm_jax.config import VISION_SIZES
from fastvlm_jax.convert import convnext, timm, vit
from fastvlm_jax.convert.files import CONFIG, OPEN_CLIP_CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.convert.mapping import Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.fastvit import FastViT

ARCHITECTURES = {
    **{f"fastvit_mci{i}": VISION_SIZES[f"mci{i}"] for i in range(5)},
    "convnext_large": VISION_SIZES["convnext_l"],
    "convnext_xxlarge": VISION_SIZES["convnext_xxl"],
}
# An architecture stands for these attributes; layers and widths can be given beside it.
FIXED = {"fastvit": ("mixers", "stem_scale", "attention_norm"), "convnext": ("epsilon",)}
# Arguments of timm, and what they are here; a stage more or less cuts the base's values.
FASTVIT_ARGS = {"layers": "layers", "embed_dims": "embed_dims", "token_mixers": "mixers"}
CONVNEXT_ARGS = {"depths": "layers", "dims": "embed_dims"}
# Arguments that change nothing before the head.
TRAINING_ONLY = ("layer_scale_init_value", "ls_init_value", "drop_path_rate", "proj_drop_rate", "drop_rate")
HEAD_ONLY = ("num_classes", "global_pool")
TRUNK, PREPROCESSOR = "visual.trunk.", "preprocessor_config.json"
# The text towers that stand beside them: MobileCLIP's, and those of open_clip's ConvNeXt models.
L_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 16}
XXL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12, "no_causal_mask": True}


def timm_args(vision: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's architecture, and the arguments to build `vision` from it.

    Raises:
      ValueError: a tower that none of timm's architectures can be made to be.
    """
    family = "convnext" if isinstance(vision, ConvNeXt) else "fastvit"
    if not isinstance(vision, FastViT | ConvNeXt):
        raise ValueError(f"timm's names hold a FastViT or a ConvNeXt, not a {type(vision).__name__}: use --layout hf")
    if family == "fastvit" and vision.multiscale:
        raise ValueError("model.vision.multiscale has no place in timm's names: use --layout native")
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
    value = getattr(vision, key)
    return tuple(value)[:stages] if isinstance(value, list | tuple) else value


def read_timm_args(file: pathlib.Path, prefix: str, architecture: Any, args: Any) -> dict[str, Any]:
    """The encoder's arguments that an architecture of timm and its `model_args` stand for.

    Raises:
      ValueError: naming the key that asks for another tower than this package has.
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
            raise ValueError(f"{where} gives a stage's settings that are no list")
        stages = len(vision["layers"])
        vision["embed_dims"], vision["mixers"] = vision["embed_dims"][:stages], vision["mixers"][:stages]
        vision["mlp_ratio"] = float(ratios[0])
        vision["se_stages"] = [i for i, used in enumerate(squeeze[:stages]) if used]
        vision["form"] = "folded" if args.pop("inference_mode", False) else "branched"
        if tuple(vision["mixers"]) != tuple(base.mixers)[:stages]:
            args["token_mixers"] = vision["mixers"]  # positional encodings stand before other stages in timm
    if args:
        raise ValueError(f"{where}.{next(iter(args))} asks for a tower that this package does not have")
    return vision


def read_timm(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a directory that timm loads with `local-dir:`: ({"vision": ...}, variables as Leaves).

    Raises:
      FileNotFoundError, ValueError: naming the file, key or tensor that is missing, unknown, damaged or not supported.
    """
    source = pathlib.Path(source).expanduser()
    file, config, tensors = source / CONFIG, read_json(source / CONFIG), open_weights(source)
    vision = read_timm_args(file, "", config.get("architecture"), config.get("model_args") or {})
    if "form" in vision:
        vision["form"] = "folded" if any("reparam_conv" in name for name in tensors) else "branched"
        vision |= _head(tensors, "head.fc.")
    else:
        vision |= _projection(tensors, ("head.pre_logits.fc", "head.fc"))
    vision |= _statistics(config.get("pretrained_cfg"), ARCHITECTURES[config["architecture"].partition(".")[0]])
    return _variables(source, file, vision, tensors, in_timm=True)


def read_openclip(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads the image tower of an open_clip directory, and leaves its text tower aside: ({"vision": ...}, Leaves).

    Raises:
      FileNotFoundError, ValueError: naming the file, key or tensor that is missing, unknown, damaged or not supported.
    """
    source = pathlib.Path(source).expanduser()
    file, config = source / OPEN_CLIP_CONFIG, read_json(source / OPEN_CLIP_CONFIG)
    tower = config.get("model_cfg")
    tower = tower.get("vision_cfg") if isinstance(tower, dict) else None
    if not isinstance(tower, dict):
        raise ValueError(f"{file}: model_cfg.vision_cfg is missing or not an object")
    stored = open_weights(source, "open_clip_model")
    tensors = {name: x for name, x in stored.items() if name.startswith("visual.")}
    vision = read_timm_args(file, "model_cfg.vision_cfg.", tower.get("timm_model_name"), {})
    if "form" in vision:
        vision["form"] = "folded" if any("reparam_conv" in name for name in tensors) else "branched"
        vision |= _head(tensors, f"{TRUNK}head.fc.")
    else:
        vision |= _projection(tensors, ("visual.head.proj", "visual.head.mlp.fc1", "visual.head.mlp.fc2"))
    vision |= _statistics(config.get("preprocess_cfg"), VISION_SIZES["mci4"])  # open_clip's default is OpenAI's
    return _variables(source, file, vision, tensors, in_timm=False)


def _head(tensors: Mapping, name: str) -> dict[str, Any]:
    if f"{name}weight" not in tensors:
        return {}
    shape = tensors[f"{name}weight"].get_shape()
    return {"head_features": int(shape[0]) if shape else 0, "head_bias": f"{name}bias" in tensors}


def _projection(tensors: Mapping, names: tuple[str, ...]) -> dict[str, Any]:
    stored = [name for name in names if f"{name}.weight" in tensors]
    if not stored:
        return {"projection": []}
    widths = [int((tensors[f"{name}.weight"].get_shape() or [0])[0]) for name in stored]
    return {"projection": widths, "projection_bias": f"{stored[-1]}.bias" in tensors}


def _statistics(settings: Any, default: Mapping[str, Any]) -> dict[str, list[float]]:
    settings = settings if isinstance(settings, dict) else {}
    zeros_ones = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    found = {}
    for key, fallback in zeros_ones.items():
        value = settings.get(key)
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            value = default.get(f"image_{key}", fallback)
        found[f"image_{key}"] = [float(x) for x in value]
    return found


def _variables(source, file, vision: dict, tensors: Mapping, in_timm: bool) -> tuple[dict[str, Any], dict]:
    model_config = {"vision": vision, "dtype": "float32"}
    model, shapes = described(model_config, file)
    return model_config, to_jax(_rows(fastvlm.make_encoder(**model.vision_args), in_timm), tensors, shapes, source)


def _rows(vision: nn.Module, in_timm: bool) -> list[Row]:
    """timm's names, or open_clip's."""
    if isinstance(vision, ConvNeXt):
        return convnext.tower_rows(vision) if in_timm else convnext.openclip_rows(vision)
    return timm.tower_rows(vision, "" if in_timm else TRUNK)


def write_timm(folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, dtype: str | None) -> None:
    """Writes what `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: weights and config.json."""
    model_config, variables = with_head_bias(*without_projection(model_config, variables))
    model = fastvlm.build(vision=model_config["vision"])
    vision = fastvlm.make_encoder(**model.vision_args)
    architecture, args = timm_args(vision)
    save_weights(folder, to_torch(_rows(vision, True), variables, shapes_of(model)), dtype)
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


def write_openclip(folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, dtype: str | None) -> None:
    """Writes the image tower of an open_clip model under its names, with the config of the whole; no text tower.

    Raises:
      ValueError: a tower that open_clip cannot name, because its sizes are not the published ones.
    """
    model_config, variables = with_head_bias(model_config, variables)
    model = fastvlm.build(vision=model_config["vision"])
    vision = fastvlm.make_encoder(**model.vision_args)
    architecture, args = timm_args(vision)
    if wrong := sorted(set(args) - {"inference_mode"}):
        raise ValueError(f"open_clip names architectures of fixed size: {wrong[0]}={args[wrong[0]]} has no name there")
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
    save_weights(folder, to_torch(_rows(vision, False), variables, shapes_of(model)), dtype, "open_clip_model")
    config = {"embed_dim": width, "vision_cfg": tower, "text_cfg": text, "custom_text": text is TEXT}
    images = {"mean": list(vision.image_mean), "std": list(vision.image_std), "interpolation": "bicubic"}
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": images})


def read_vit(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads the image tower of a CLIP or SigLIP directory of transformers: ({"vision": ...}, variables as Leaves).

    Raises:
      FileNotFoundError, ValueError: naming the file, key or tensor that is missing, unknown, damaged or not supported.
    """
    source = pathlib.Path(source).expanduser()
    vision = vit.read_vision_config(source / CONFIG, read_json(source / CONFIG))
    if (source / PREPROCESSOR).is_file():
        vision |= _statistics(_renamed(read_json(source / PREPROCESSOR)), vision)
    model_config = {"vision": vision, "dtype": "float32"}
    model, shapes = described(model_config, source / CONFIG)
    tower = fastvlm.make_encoder(**model.vision_args)
    tensors = {name: x for name, x in open_weights(source).items() if not vit.is_beside_tower(tower, name)}
    rows = vit.tower_rows(tower, vit.tower_prefix(tensors))
    return model_config, to_jax(rows, tensors, shapes, source)


def write_vit(folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, dtype: str | None) -> None:
    """Writes what `CLIPVisionModel` or `SiglipVisionModel` of transformers loads, and its image settings."""
    model = fastvlm.build(vision=model_config["vision"])
    vision = fastvlm.make_encoder(**model.vision_args)
    config = vit.vision_config(vision)
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
    return {"mean": settings.get("image_mean"), "std": settings.get("image_std")}


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
