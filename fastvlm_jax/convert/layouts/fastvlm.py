"""Reads and writes FastVLM as transformers 5 stores it (`FastVlmForConditionalGeneration`): weights and config.json.

The encoder is one of timm's FastViTs, the decoder a `qwen2` or, without qkv biases, a `llama`. convert.write folds a
branched encoder before export; import reads both forms.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.heads import without_head
from fastvlm_jax.convert.layouts.text_config import expect, read_text_config, text_config
from fastvlm_jax.convert.layouts.timm_args import read_timm_args, timm_args
from fastvlm_jax.convert.mapping import Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.tables.decoder import FIRST_NORM, decoder_rows
from fastvlm_jax.convert.tables.projector import projector_rows
from fastvlm_jax.convert.tables.timm import tower_rows
from fastvlm_jax.convert.vocabulary import drop_tied_head, special_ids, with_image_token
from fastvlm_jax.convert.weight_files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.processor import Processor

MODEL_TYPE = "fast_vlm"
EMBEDDING = "model.language_model.embed_tokens.weight"


def rows(vision: FastViT, llm: Decoder) -> list[Row]:
    """Returns the layout for the sizes of `vision` and `llm` and the form of `vision`."""
    tower = tower_rows(vision, prefix="model.vision_tower.timm_model.")
    projector = projector_rows("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    return tower + projector + decoder_rows(llm, "model.language_model.")


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a model directory, single file or shards: (model_config, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    model_config = read_config(source / CONFIG)
    tensors = with_usual_prefix(open_weights(source), FIRST_NORM, "model.language_model.", source)
    model, shapes = described(model_config, source / CONFIG)
    vision, llm = fastvlm.make_encoder(**model.vision_args), Decoder(**model.llm_args)
    drop_tied_head(llm, tensors, EMBEDDING, source)
    return model_config, to_jax(rows(vision, llm), tensors, shapes, source)


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """Reads the model config, arguments of `fastvlm.build`, from a transformers `config.json`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a key is missing or has a value that this package does not compute; the message names it.
    """
    config = read_json(file)
    expect(file, "", config, model_type=(MODEL_TYPE,), projector_hidden_act=("gelu",), vision_feature_layer=(-1,))
    expect(file, "", config, multimodal_projector_bias=(True,), vision_feature_select_strategy=("full",))
    for key in ("vision_config", "text_config"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{file}: {key} is {config.get(key)!r}, it must be an object")
    vision, text = config["vision_config"], config["text_config"]
    expect(file, "vision_config.", vision, model_type=("timm_wrapper",))
    args = vision.get("model_args") or {}
    tower = read_timm_args(file, "vision_config.", vision.get("architecture"), args)
    return {"vision": tower, "llm": read_text_config(file, text, config), "dtype": "float32"}


def write(
    folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, processor: Processor, dtype: str | None
) -> None:
    """Writes a directory for `transformers.FastVlmForConditionalGeneration.from_pretrained`, and the processor's files.

    Transformers finds every tensor that it expects and no other.

    Args:
      folder: an existing folder.
      model_config, variables: a whole model with a folded encoder; its CLIP projection is left out.
      processor: source of the special ids and of the processor's files.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: transformers cannot express a size of the model, or the variables belong to another model.
    """
    model_config, variables = without_head(model_config, variables)
    processor = with_image_token(processor, model_config)
    model = fastvlm.build(**model_config)
    vision, llm = fastvlm.make_encoder(**model.vision_args), Decoder(**model.llm_args)
    tower = vision_config(vision)
    ids = special_ids(processor)
    stored = save_weights(folder, to_torch(rows(vision, llm), variables, shapes_of(model)), dtype)
    config = {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "dtype": stored,
        "image_token_index": processor.tokenizer.image_id,
        "image_seq_length": processor.tokens_per_image,
        "tie_word_embeddings": llm.tie_embeddings,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": tower,
        "text_config": text_config(llm, **ids),
    }
    write_json(folder / CONFIG, config)
    processor.save(folder, export=True)


def vision_config(vision: FastViT) -> dict[str, Any]:
    """Returns the `vision_config` of a tower; ValueError if timm has no such architecture."""
    architecture, args = timm_args(vision)
    return {
        "model_type": "timm_wrapper",
        "architecture": architecture,
        "model_args": args,
        "hidden_size": vision.features,
        "do_pooling": True,
        "global_pool": "avg",
        "num_classes": 0,
        "label_names": [],
    }
