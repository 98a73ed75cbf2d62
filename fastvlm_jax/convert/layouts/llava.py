"""Reads and writes ml-fastvlm's layout (LLaVA's `LlavaQwen2ForCausalLM`), the input of its predict.py and exporters.

The tower is always FastViTHD (`mm_vision_tower: mobileclip_l_1024`, where the number is the image size): folded in the
released models, in training form after fine-tuning. The projector is `mlp2x_gelu`.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from fastvlm_jax.convert.heads import without_head
from fastvlm_jax.convert.layouts.text_config import expect, read_text_config, text_config
from fastvlm_jax.convert.mapping import Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.tables import apple
from fastvlm_jax.convert.tables.decoder import FIRST_NORM, decoder_rows
from fastvlm_jax.convert.tables.projector import projector_rows
from fastvlm_jax.convert.vocabulary import drop_tied_head, special_ids, with_image_token
from fastvlm_jax.convert.weight_files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.processor import Processor

TOWER = "mobileclip_l"
PREFIX = "model.vision_tower.vision_tower.model."
HEAD = PREFIX + "head.proj"
HEAD_FEATURES = 768  # width of mobileclip_l.json's CLIP projection, which ml-fastvlm stores but does not compute
# What LLaVA's code and mlx-vlm put in a prompt for an image; ml-fastvlm's exporter replaces it by the id of `<image>`.
IMAGE_MARK = -200
HD = FastViT()


def rows(vision: FastViT, llm: Decoder) -> list[Row]:
    """Returns the layout for the form of `vision` and the sizes of `llm`."""
    projector = projector_rows("model.mm_projector.0", "model.mm_projector.2")
    return apple.tower_rows(vision, PREFIX) + projector + decoder_rows(llm, "model.")


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a checkpoint directory, single file or shards: (model_config, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    config = read_json(source / CONFIG)
    tensors = with_usual_prefix(open_weights(source), FIRST_NORM, "model.", source)
    image_size(source / CONFIG, config)
    vision = {"layers": list(HD.layers), "embed_dims": list(HD.embed_dims)}
    vision["form"] = "branched" if any(".rbr_" in name for name in tensors) else "folded"
    vision["head_features"] = HEAD_FEATURES if HEAD in tensors else 0
    model_config = {"vision": vision, "llm": read_text_config(source / CONFIG, config), "dtype": "float32"}
    model, shapes = described(model_config, source / CONFIG)
    tower, llm = fastvlm.make_encoder(**model.vision_args), Decoder(**model.llm_args)
    drop_tied_head(llm, tensors, "model.embed_tokens.weight", source)
    return model_config, to_jax(rows(tower, llm), tensors, shapes, source)


def image_size(file: pathlib.Path, config: Mapping[str, Any]) -> int:
    """Returns the image size, in pixels a side, that `mm_vision_tower` names.

    Args:
      file: where `config` comes from, for messages.
      config: the parsed config.json.

    Raises:
      ValueError: the tower, the projector or the handling of image tokens is not FastVLM's.
    """
    tower = str(config.get("mm_vision_tower"))
    name, _, size = tower.rpartition("_")
    if name != TOWER or not size.isascii() or not size.isdigit() or not int(size) or int(size) % HD.stride:
        raise ValueError(f"{file}: mm_vision_tower is {tower!r}, this package reads {TOWER}_SIZE, such as {TOWER}_1024")
    expect(file, "", config, mm_projector_type=("mlp2x_gelu",), mm_use_im_start_end=(False,))
    expect(file, "", config, mm_use_im_patch_token=(False,), mm_patch_merge_type=("flat",))
    return int(size)


def image_fit(file: pathlib.Path, config: Mapping[str, Any]) -> tuple[str | None, tuple[tuple[int, int], ...]]:
    """Returns how ml-fastvlm fits images into the square: (fit, grids), see `Processor`; fit None means as CLIP does.

    Args:
      file, config: see `image_size`.

    Raises:
      ValueError: image_aspect_ratio or image_grid_pinpoints asks for something else.
    """
    side = image_size(file, config)
    aspect, pinpoints = config.get("image_aspect_ratio"), config.get("image_grid_pinpoints")
    if aspect in ("pad", "square", None):
        return ("pad" if aspect == "pad" else None), ()
    try:
        grids = tuple((height // side, width // side) for width, height in pinpoints)
    except (TypeError, ValueError):
        grids = ()
    if aspect != "anyres" or not grids or any(min(grid) < 1 for grid in grids):
        raise ValueError(
            f"{file}: image_aspect_ratio is {aspect!r} with image_grid_pinpoints {pinpoints!r}, this package reads "
            "'pad', 'square', or 'anyres' with a list of [width, height]"
        )
    return "pad", grids


def write(
    folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, processor: Processor, dtype: str | None
) -> None:
    """Writes a directory for ml-fastvlm's predict.py, Core ML and MLX export: weights, config.json and the processor.

    ml-fastvlm stores a CLIP projection without computing it: zeros are written unless the model has a fitting one.

    Args:
      folder: an existing folder.
      model_config, variables: a whole model with a folded encoder.
      processor: source of the special ids, the image size and the processor's files.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: the tower is not FastViTHD, the language model is not a Qwen2, or the variables belong to another
        model.
    """
    vision = fastvlm.make_encoder(**fastvlm.build(**model_config).vision_args)
    sizes = ("layers", "embed_dims", "mixers", "mlp_ratio", "se_stages", "attention_norm", "multiscale", "stem_scale")
    sizes += ("image_mean", "image_std")
    if not isinstance(vision, FastViT) or any(_plain(vision, key) != _plain(HD, key) for key in sizes):
        raise ValueError(
            "the llava layout holds FastViTHD alone (ml-fastvlm builds no other): use --layout hf or native"
        )
    if not model_config["llm"].get("qkv_bias", True):
        raise ValueError("ml-fastvlm loads Qwen2 alone, and this language model is a Llama: use --layout hf or native")
    if vision.head_features != HEAD_FEATURES or vision.head_bias:
        model_config, variables = without_head(model_config, variables)
        projection = np.zeros((vision.features, HEAD_FEATURES), _tower_dtype(variables))
        head = {"head_features": HEAD_FEATURES, "head_bias": False}
        model_config = {**model_config, "vision": {**model_config["vision"], **head}}
        params = dict(variables["params"])
        params["vision"] = {**params["vision"], "head": {"kernel": projection}}
        variables = {**variables, "params": params}
    processor = with_image_token(processor, model_config)
    warn_of_exporter(processor)
    model = fastvlm.build(**model_config)
    vision, llm = fastvlm.make_encoder(**model.vision_args), Decoder(**model.llm_args)
    stored = save_weights(folder, to_torch(rows(vision, llm), variables, shapes_of(model)), dtype)
    ids, side = special_ids(processor), processor.image_size
    config = text_config(llm, **ids)
    config |= {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "torch_dtype": stored,
        "image_token_index": IMAGE_MARK,
        "image_aspect_ratio": "anyres" if processor.grids else "pad" if processor.fit == "pad" else "square",
        "image_grid_pinpoints": [[columns * side, rows * side] for rows, columns in processor.grids] or None,
        "mm_hidden_size": vision.features,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"{TOWER}_{side}",
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,  # makes ml-fastvlm build the tower before the weights are loaded
        "use_mm_proj": True,
    }
    write_json(folder / CONFIG, config)
    processor.save(folder, export=True, padded_before=True)


def warn_of_exporter(processor: Processor) -> None:
    """Warns if ml-fastvlm's export_vision_encoder.py, which guesses the id of `<image>`, will write another one."""
    image, added = processor.tokenizer.image_id, processor.tokenizer.library().get_added_tokens_decoder()
    if image != (guess := max(i for i in added if i != image) + 1):
        logging.warning(
            "ml-fastvlm's export_vision_encoder.py will write image_token_index %d into config.json, but <image> is %d "
            "here: correct it after that export",
            guess, image,
        )  # fmt: skip


def _plain(vision: FastViT, key: str):
    value = getattr(vision, key)
    return list(value) if isinstance(value, list | tuple) else value


def _tower_dtype(variables: dict) -> np.dtype:
    return np.dtype(variables["params"]["vision"]["stem_0"]["folded"]["kernel"].dtype)
