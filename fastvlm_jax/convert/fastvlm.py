"""FastVLM as transformers stores it (`FastVlmForConditionalGeneration`, transformers 5): weights and config.json.

The encoder is one of timm's FastViTs, the decoder a `qwen2` or, without qkv biases, a `llama`. Export folds a branched
encoder; import takes both forms.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvlm_jax.convert import causal_lm, encoder
from fastvlm_jax.convert.decoder import decoder_rows, expect, read_text_config, text_config
from fastvlm_jax.convert.files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.convert.mapping import LINEAR, SAME, Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.timm import tower_rows
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.processor import Processor

MODEL_TYPE = "fast_vlm"
EMBEDDING = "model.language_model.embed_tokens.weight"


def rows(vision: FastViT, llm: Decoder) -> list[Row]:
    """The layout, for the sizes and the form of `vision` and `llm`."""
    tower = tower_rows(vision, prefix="model.vision_tower.timm_model.")
    projector = projector_rows("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    return tower + projector + decoder_rows(llm, "model.language_model.")


def projector_rows(first: str, second: str) -> list[Row]:
    """The rows of the projector, whose two layers have these names."""
    return [
        Row(f"{torch}.{kind}", f"params/projector/{ours}/{name}", transform)
        for torch, ours in ((first, "fc1"), (second, "fc2"))
        for kind, name, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a model directory, single or sharded: (model_config, variables as Leaves).

    Raises:
      FileNotFoundError, ValueError: naming the file, key or tensor that is missing, unknown, damaged or not supported.
    """
    source = pathlib.Path(source).expanduser()
    model_config = read_config(source / CONFIG)
    tensors = open_weights(source)
    model, shapes = described(model_config, source / CONFIG)
    vision, llm = fastvlm.make_encoder(**model.vision_args), Decoder(**model.llm_args)
    causal_lm.drop_tied_head(llm, tensors, EMBEDDING, source)
    return model_config, to_jax(rows(vision, llm), tensors, shapes, source)


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """The model config that a transformers `config.json` describes.

    Raises:
      ValueError: naming the key that is missing, or whose value this package does not compute.
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
    tower = encoder.read_timm_args(file, "vision_config.", vision.get("architecture"), args)
    return {"vision": tower, "llm": read_text_config(file, text, config), "dtype": "float32"}


def write(
    folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, processor: Processor, dtype: str | None
) -> None:
    """Writes what `transformers.FastVlmForConditionalGeneration.from_pretrained` loads strictly, and the processor.

    Args:
      model_config, variables: of a whole model with a folded encoder; a CLIP projection is left out.
      processor: knows the special ids and writes its own files.
      dtype: of the stored weights; None leaves each as it is.

    Raises:
      ValueError: a size that transformers cannot express, variables of another model.
    """
    model_config, variables = encoder.without_head(model_config, variables)
    processor, model_config, variables = with_image_token(processor, model_config, variables)
    model = fastvlm.build(**model_config)
    vision, llm = fastvlm.make_encoder(**model.vision_args), Decoder(**model.llm_args)
    tower = vision_config(vision)
    ids = causal_lm.special_ids(processor)
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
    write_json(folder / "generation_config.json", {"do_sample": False, **ids})
    processor.save(folder)


def vision_config(vision: FastViT) -> dict[str, Any]:
    """The `vision_config` of a tower (ValueError where timm has none of the kind)."""
    architecture, args = encoder.timm_args(vision)
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


def with_image_token(
    processor: Processor, model_config: Mapping[str, Any], variables: dict
) -> tuple[Processor, Mapping[str, Any], dict]:
    """A processor whose tokenizer has `<image>`, on the next free id if need be, and a model with room for it."""
    processor = dataclasses.replace(processor, tokenizer=processor.tokenizer.with_image())
    return processor, *with_room_for(processor.tokenizer.image_id, model_config, variables)


def with_room_for(token: int, model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """A model whose vocabulary holds `token`: up to 64 rows are added, copies of row 0, which is never the likeliest.

    Vicuna's 32,000 words have no `<image>`; the published conversions add rows to the embedding and the head too.
    """
    llm = dict(model_config["llm"])
    missing = token + 1 - llm["vocab_size"]
    if missing <= 0:
        return model_config, variables
    rows = -(-missing // 64) * 64
    llm["vocab_size"] += rows
    params = {**variables["params"], "llm": dict(variables["params"]["llm"])}
    embedding = np.asarray(params["llm"]["embedding"])
    params["llm"]["embedding"] = np.concatenate([embedding, np.repeat(embedding[:1], rows, axis=0)])
    if "lm_head" in params["llm"]:
        head = np.asarray(params["llm"]["lm_head"]["kernel"])
        params["llm"]["lm_head"] = {"kernel": np.concatenate([head, np.repeat(head[:, :1], rows, axis=1)], axis=1)}
    return {**model_config, "llm": llm}, {**variables, "params": params}
