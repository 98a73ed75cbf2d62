"""Reads and writes open_clip directories: both towers of a CLIP, or its image tower alone.

Names in a file of both towers; older versions of open_clip wrote one module, and DDP writes `module.` before each name:

    visual.trunk.stem.0...    text.transformer.resblocks.0...    text.ln_final.weight    logit_scale
    visual.trunk.stem.0...    transformer.resblocks.0...         ln_final.weight         logit_scale
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from fastvlm_jax.convert.heads import with_head_bias
from fastvlm_jax.convert.layouts.openclip_text import read_text, text_cfg, why_not
from fastvlm_jax.convert.layouts.timm_args import head_of, image_statistics, projection_of, read_timm_args, timm_args
from fastvlm_jax.convert.mapping import Row, Tensor, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.squeezed import squeezed
from fastvlm_jax.convert.tables import convnext, text_tower, timm
from fastvlm_jax.convert.tables.timm import FIRST_MLP
from fastvlm_jax.convert.weight_files import OPEN_CLIP_CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.images.decode import MAX_SIDE
from fastvlm_jax.models import clip, fastvlm, kinds
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.sizes import TEXT_SIZES, VISION_SIZES
from fastvlm_jax.models.text_tower import TextTower
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.text.clip_tokenizer import ClipTokenizer

TRUNK = "visual.trunk."
FIRST_TEXT = "token_embedding.weight"  # a tensor of every text tower of open_clip, without a prefix
# Config of the text tower that open_clip pairs with ConvNeXt-L, with ConvNeXt-XXL, and with MobileCLIP's image towers.
L_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 16}
XXL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
TEXT = text_cfg(TextTower(**TEXT_SIZES["768"]))
FITS = {"shortest": "crop", "longest": "pad", "squash": "stretch"}  # open_clip's resize_mode -> our name


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads an open_clip directory: ({"vision": ..., "text": ..., "sigmoid": ..., "dtype": ...}, variables as Leaves).

    It is an encoder alone, {"vision": ..., "dtype": ...}, if no text tower is stored, or one that is not computed here;
    a warning then says why.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    file, config = source / OPEN_CLIP_CONFIG, read_json(source / OPEN_CLIP_CONFIG)
    clip_config = config.get("model_cfg")
    tower = clip_config.get("vision_cfg") if isinstance(clip_config, dict) else None
    if not isinstance(tower, dict):
        raise ValueError(f"{file}: model_cfg.vision_cfg is missing or not an object")
    tensors = with_usual_prefix(open_weights(source, "open_clip_model"), FIRST_MLP, TRUNK, source)
    vision = read_timm_args(file, "model_cfg.vision_cfg.", tower.get("timm_model_name"), {})
    if "form" in vision:
        vision["form"] = "folded" if any("reparam_conv" in name for name in tensors) else "branched"
        vision |= head_of(tensors, f"{TRUNK}head.fc.")
    else:
        vision |= projection_of(tensors, ("visual.head.proj", "visual.head.mlp.fc1", "visual.head.mlp.fc2"))
    # open_clip's default mean and std are OpenAI's, as mci4's.
    vision |= image_statistics(config.get("preprocess_cfg"), VISION_SIZES["mci4"])
    model_config, prefix = {"vision": vision, "dtype": "float32"}, _text_prefix(tensors)
    left_out = None if prefix is None else _why_without_text(clip_config, vision)
    if prefix is None or left_out:
        if left_out:
            logging.warning("%s: the text tower is left out: model_cfg.%s", file, left_out)
        tensors = {name: x for name, x in tensors.items() if name.startswith("visual.")}
    else:
        model_config |= {"text": read_text(clip_config), "sigmoid": "logit_bias" in tensors}
        tensors = squeezed(tensors, 0, *text_tower.LOGITS)
    model, shapes = described(model_config, file)
    return model_config, to_jax(_rows(model, prefix or ""), tensors, shapes, source)


def image_settings(source: pathlib.Path) -> tuple[int, str]:
    """Returns (side of the square that the image tower sees, pixels; how images are fitted into it, see `fit_into`).

    Raises:
      ValueError: open_clip_config.json gives another shape or way.
    """
    file, config = source / OPEN_CLIP_CONFIG, read_json(source / OPEN_CLIP_CONFIG)
    side, images = config["model_cfg"]["vision_cfg"].get("image_size", 224), config.get("preprocess_cfg")
    if isinstance(side, list) and len(set(map(str, side))) == 1:
        side = side[0]
    mode = images.get("resize_mode", "shortest") if isinstance(images, dict) else "shortest"
    if type(side) is not int or not 0 < side <= MAX_SIDE:
        raise ValueError(f"{file}: model_cfg.vision_cfg.image_size is {side!r}, it must be the side of a square")
    if mode not in FITS:
        raise ValueError(f"{file}: preprocess_cfg.resize_mode is {mode!r}, it must be one of {', '.join(FITS)}")
    return side, FITS[mode]


def _text_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns what precedes the names of the text tower's tensors; None if no text tower is stored."""
    if any(name.startswith(text_tower.PREFIX) for name in tensors):
        return text_tower.PREFIX
    return "" if FIRST_TEXT in tensors else None


def _why_without_text(config: Mapping[str, Any], vision: Mapping[str, Any]) -> str | None:
    """Returns what keeps a CLIP of open_clip from being read with both towers; None if nothing does."""
    if "form" not in vision:
        return "vision_cfg.timm_model_name is a ConvNeXt, whose image embedding this package does not compute"
    if config["vision_cfg"].get("timm_pool", "avg") != "avg":
        return f"vision_cfg.timm_pool is {config['vision_cfg']['timm_pool']!r}, this package computes 'avg' alone"
    return why_not(config)


def _rows(model: kinds.Model, prefix: str = text_tower.PREFIX) -> list[Row]:
    """Returns the rows of an encoder alone or of a CLIP, whose text tower's names begin with `prefix`."""
    vision = fastvlm.make_encoder(**model.vision_args)
    rows = convnext.openclip_rows(vision) if isinstance(vision, ConvNeXt) else timm.tower_rows(vision, TRUNK)
    if not isinstance(model, CLIP):
        return rows
    text = text_tower.tower_rows(TextTower(**model.text_args), prefix)
    return [*rows, *text, *text_tower.logit_rows(model.sigmoid)]


def write(
    folder: pathlib.Path,
    model_config: Mapping[str, Any],
    variables: dict,
    dtype: str | None,
    processor: PairProcessor | None = None,
) -> None:
    """Writes an open_clip directory; for an encoder alone it describes a whole CLIP, and holds no weights of texts.

    Args:
      folder: an existing folder.
      model_config, variables: a CLIP whose encoder is a FastViT, or an encoder alone.
      dtype: dtype of the stored weights; None keeps each tensor's own.
      processor: image settings of a CLIP, and its tokenizer, which is written if it is CLIP's own; None for 256 px, as
        all published ones with a FastViT have.

    Raises:
      ValueError: open_clip has no name for the tower, because its sizes are not published ones.
    """
    model_config, variables = with_head_bias(model_config, variables)
    model = kinds.build(**model_config)
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
        tower |= {"timm_pool": "avg", "timm_proj": None, "image_size": processor.image_size if processor else 256}
        text = text_cfg(TextTower(**model.text_args)) if isinstance(model, CLIP) else TEXT
        width = vision.head_features or text["width"]
    save_weights(folder, to_torch(_rows(model), variables, shapes_of(model)), dtype, "open_clip_model")
    config = {"embed_dim": width, "vision_cfg": tower, "text_cfg": text}
    config["custom_text"] = not isinstance(vision, ConvNeXt)
    if isinstance(model, CLIP) and model.sigmoid:  # open_clip has a bias only where its config gives an initial one
        config |= {f"init_{name}": value for name, value in clip.initial_logits(True).items()}
    images = {"mean": list(vision.image_mean), "std": list(vision.image_std), "interpolation": "bicubic"}
    if isinstance(model, CLIP):  # as of every published MobileCLIP with a FastViT
        images |= {"interpolation": "bilinear", "resize_mode": "shortest"}
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": images})
    if processor is not None and isinstance(processor.tokenizer, ClipTokenizer):
        processor.tokenizer.save(folder)
