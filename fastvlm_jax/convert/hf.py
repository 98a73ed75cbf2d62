"""FastVLM as transformers stores it (`FastVlmForConditionalGeneration`, transformers 5): weights and config.json.

The encoder is timm's `fastvit_mci3` with its sizes in `model_args`, the decoder a `qwen2` (or, without qkv biases, a
`llama`). Export folds a branched encoder; import takes both forms.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from fastvlm_jax.convert.files import DTYPES, new_folder, open_weights, read_json, save_weights, write_json
from fastvlm_jax.convert.mapping import LINEAR, SAME, Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.timm import tower_rows
from fastvlm_jax.data.processor import Processor
from fastvlm_jax.data.tokenizer import END, IMAGE, PAD
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fold import fold_variables

MODEL_TYPE = "fast_vlm"
ARCHITECTURE = "fastvit_mci3"
# What timm's fastvit_mci3 fixes: positional encodings before its 4th and 5th stage, where we put them by the mixer.
MCI3 = FastViT()
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def rows(vision: FastViT, llm: Decoder) -> list[Row]:
    """The layout, for the sizes and the form of `vision` and `llm`."""
    layer, path, depth = "model.language_model.layers.{i}", "params/llm/layers", llm.num_layers
    tower = tower_rows(vision.layers, vision.mixers, vision.form, prefix="model.vision_tower.timm_model.")
    projector = [
        Row(f"model.multi_modal_projector.linear_{i}.{torch}", f"params/projector/fc{i}/{name}", transform)
        for i in (1, 2)
        for torch, name, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]
    decoder = [
        Row("model.language_model.embed_tokens.weight", "params/llm/embedding"),
        Row("model.language_model.norm.weight", "params/llm/final_norm/scale"),
        Row(f"{layer}.input_layernorm.weight", f"{path}/attention_norm/scale", SAME, depth),
        Row(f"{layer}.post_attention_layernorm.weight", f"{path}/mlp_norm/scale", SAME, depth),
        *(Row(f"{layer}.self_attn.{x}_proj.weight", f"{path}/{x}/kernel", LINEAR, depth) for x in "qkvo"),
        *(Row(f"{layer}.self_attn.{x}_proj.bias", f"{path}/{x}/bias", SAME, depth) for x in "qkv" if llm.qkv_bias),
        *(Row(f"{layer}.mlp.{torch}.weight", f"{path}/{x}/kernel", LINEAR, depth) for x, torch in MLP.items()),
    ]
    if not llm.tie_embeddings:
        decoder.append(Row("lm_head.weight", "params/llm/lm_head/kernel", LINEAR))
    return tower + projector + decoder


def export_hf(
    variables: dict,
    model_config: Mapping[str, Any],
    processor: Processor,
    target: str | os.PathLike,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a model directory that `transformers.FastVlmForConditionalGeneration.from_pretrained` loads strictly.

    Args:
      variables: of `fastvlm.build(**model_config)`; branched encoders are folded on the way.
      model_config: {"vision": ..., "llm": ..., "dtype": ...}.
      processor: knows the special ids and writes its own files.
      target: a folder that does not exist or is empty; with `overwrite`, a model directory to replace.
      dtype: of the stored weights.

    Raises:
      ValueError: a size that transformers cannot express, variables of another model, an occupied target.
    """
    model_config = {**model_config, "vision": {**model_config["vision"], "form": "folded"}}
    model = fastvlm.build(**model_config)
    vision, llm = FastViT(**model.vision_args), Decoder(**model.llm_args)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    special = {name: processor.tokenizer.special_id(name) for name in (PAD, END, IMAGE)}
    config = {
        "architectures": ["FastVlmForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "image_token_index": special[IMAGE],
        "image_seq_length": processor.tokens_per_image,
        "tie_word_embeddings": llm.tie_embeddings,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": vision_config(vision),
        "text_config": text_config(llm, special),
    }
    ids = {key: config["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with new_folder(target, overwrite) as folder:
        tensors = to_torch(rows(vision, llm), fold_variables(nn.unbox(variables)), shapes_of(model))
        save_weights(folder / "model.safetensors", tensors, dtype)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {"do_sample": False, **ids})
        processor.save(folder)


def vision_config(vision: FastViT) -> dict[str, Any]:
    """The `vision_config` of a folded tower.

    Raises:
      ValueError: attention where fastvit_mci3 has none, or the reverse.
    """
    stages = len(vision.layers)
    if tuple(vision.mixers) != MCI3.mixers[:stages]:
        raise ValueError(
            f"vision.mixers={list(vision.mixers)} has no transformers layout: timm's {ARCHITECTURE} has positional "
            f"encodings before stages 4 and 5 only, so use {list(MCI3.mixers[:stages])}"
        )
    model_args = {"layers": list(vision.layers), "embed_dims": list(vision.embed_dims), "inference_mode": True}
    if vision.mlp_ratio != MCI3.mlp_ratio:
        model_args["mlp_ratios"] = [vision.mlp_ratio] * stages
    return {
        "model_type": "timm_wrapper",
        "architecture": ARCHITECTURE,
        "model_args": model_args,
        "hidden_size": vision.features,
        "do_pooling": True,
        "global_pool": "avg",
        "num_classes": 0,
        "label_names": [],
    }


def text_config(llm: Decoder, special: Mapping[str, int]) -> dict[str, Any]:
    """The `text_config` of a decoder with these special ids."""
    if special[IMAGE] >= llm.vocab_size:
        raise ValueError(f"llm.vocab_size={llm.vocab_size} is too small for the tokenizer: {IMAGE} is {special[IMAGE]}")
    config = {
        "model_type": "qwen2" if llm.qkv_bias else "llama",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.size_of_head,
        "hidden_act": "silu",
        "rms_norm_eps": llm.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": llm.tie_embeddings,
        "bos_token_id": special[PAD],  # Qwen2's <|endoftext|> is both
        "pad_token_id": special[PAD],
        "eos_token_id": special[END],
    }
    return config if llm.qkv_bias else {**config, "attention_bias": False, "mlp_bias": False}


def import_hf(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a transformers model directory, single or sharded.

    Returns:
      (model_config, variables): `fastvlm.build(**model_config)` is the model, variables are float32 numpy arrays.

    Raises:
      FileNotFoundError, ValueError: naming the file, key or tensor that is missing, unknown, damaged or not supported.
    """
    source = pathlib.Path(source).expanduser()
    model_config = read_config(source / "config.json")
    tensors = open_weights(source)
    model, shapes = described(model_config, source / "config.json")
    vision, llm = FastViT(**model.vision_args), Decoder(**model.llm_args)
    if llm.tie_embeddings and (head := tensors.pop("lm_head.weight", None)) is not None:
        embedding = tensors.get("model.language_model.embed_tokens.weight")
        if embedding is None or not np.array_equal(head[:], embedding[:]):
            raise ValueError(f"{source}: config.json ties lm_head.weight to the embedding, but they differ")
    return model_config, to_jax(rows(vision, llm), tensors, shapes, source)


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """The model config that a transformers `config.json` describes.

    Raises:
      ValueError: naming the key that is missing, or whose value this package does not compute.
    """
    config = read_json(file)
    _expect(file, "", config, model_type=(MODEL_TYPE,), projector_hidden_act=("gelu",), vision_feature_layer=(-1,))
    _expect(file, "", config, multimodal_projector_bias=(True,), vision_feature_select_strategy=("full",))
    vision, text = (_get(file, config, key, dict) for key in ("vision_config", "text_config"))
    return {"vision": _read_vision(file, vision), "llm": _read_text(file, text, config), "dtype": "float32"}


def _read_vision(file: pathlib.Path, config: dict) -> dict[str, Any]:
    _expect(file, "vision_config.", config, model_type=("timm_wrapper",), architecture=(ARCHITECTURE,))
    args = dict(config.get("model_args") or {})
    layers = args.pop("layers", list(MCI3.layers))
    vision = {"layers": layers, "embed_dims": args.pop("embed_dims", list(MCI3.embed_dims))[: len(layers)]}
    vision["mixers"] = list(args.pop("token_mixers", MCI3.mixers))[: len(layers)]
    ratios = set(args.pop("mlp_ratios", [MCI3.mlp_ratio]))
    vision["mlp_ratio"] = float(min(ratios))
    vision["form"] = "folded" if args.pop("inference_mode", False) else "branched"
    for training_only in ("layer_scale_init_value", "drop_path_rate"):
        args.pop(training_only, None)
    if args or len(ratios) > 1 or tuple(vision["mixers"]) != MCI3.mixers[: len(layers)]:
        wrong = next(iter(args), "mlp_ratios" if len(ratios) > 1 else "token_mixers")
        raise ValueError(f"{file}: vision_config.model_args.{wrong} asks for a tower that this package does not have")
    return vision


def _read_text(file: pathlib.Path, config: dict, whole: dict) -> dict[str, Any]:
    _expect(file, "text_config.", config, model_type=("qwen2", "llama"), hidden_act=("silu",))
    _expect(file, "text_config.", config, use_sliding_window=(False,), attention_bias=(False,), mlp_bias=(False,))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _expect(file, "text_config.rope_parameters.", rope, rope_type=("default",), type=("default",))
    sizes = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "mlp_dim": "intermediate_size",
    }
    llm = {ours: _get(file, config, f"text_config.{theirs}", int) for ours, theirs in sizes.items()}
    # Transformers leaves these out where they have their class's default.
    llm["head_dim"] = config.get("head_dim") or llm["width"] // llm["num_heads"]
    llm["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    llm["epsilon"] = float(config.get("rms_norm_eps", 1e-6))
    llm["qkv_bias"] = config["model_type"] == "qwen2"
    llm["tie_embeddings"] = bool(whole.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    return llm


def _get(file: pathlib.Path, config: dict, key: str, kind: type) -> Any:
    value = config.get(key.rpartition(".")[2])
    if not isinstance(value, kind) or value == 0:
        raise ValueError(f"{file}: {key} is {value!r}, it must be {'an object' if kind is dict else 'a whole number'}")
    return value


def _expect(file: pathlib.Path, prefix: str, config: dict, **allowed: tuple) -> None:
    """Refuses a stored value that means another computation; an absent one is transformers' default, the first."""
    for key, values in allowed.items():
        if (found := config.get(key, values[0])) not in values:
            names = " or ".join(repr(value) for value in values)
            raise ValueError(f"{file}: {prefix}{key} is {found!r}, this package computes {names} only")
