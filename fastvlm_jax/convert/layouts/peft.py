"""Reads and writes adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors.

A tensor is named after the module that it adapts:

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight    [r, I]
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight    [O, r]
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from fastvlm_jax.convert.layouts import fastvlm, llava
from fastvlm_jax.convert.mapping import Row, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.tables.decoder import decoder_rows
from fastvlm_jax.convert.weight_files import ADAPTER, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fastvlm import FastVLM, make_encoder
from fastvlm_jax.models.lora import MOST_ALPHA, MOST_RANK, Lora

CONFIG, STEM = ADAPTER[0], "adapter_model"
BEFORE, PARTS = "base_model.model.", {"a": ".lora_A.weight", "b": ".lora_B.weight"}
# Keys of adapter_config.json whose values this package computes; those with another value are refused.
EXPECTED = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "lora_bias": (False, None),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "use_qalora": (False, None), "use_bdlora": (None, False), "alora_invocation_tokens": (None,),
    "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
}  # fmt: skip
# Ways to begin that change the base model too, so that the adapters fit no other.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def holds_adapters(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds adapters instead of a whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in whole)


def read_config(folder: pathlib.Path) -> tuple[Lora, str]:
    """Reads adapter_config.json: (the adapters, all of whose targets are left open, and the name of their base).

    Raises:
      ValueError: a key has a value that this package does not compute; the message names it.
    """
    file, config = folder / CONFIG, read_json(folder / CONFIG)
    for key, values in EXPECTED.items():
        if key in config and config[key] not in values:
            raise ValueError(
                f"{file}: {key} is {config[key]!r}, only {values[0]!r} can be read: merge the adapters with "
                "`merge_and_unload()` of peft, and give the folder that `save_pretrained` then writes"
            )
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise ValueError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r}, whose adapters fit a changed base: save "
            "them with path_initial_model_for_weight_conversion, or merge them, in peft"
        )
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    if type(rank) is not int or not 0 < rank <= MOST_RANK:
        raise ValueError(f"{file}: r is {rank!r}, it must be a whole number from 1 to {MOST_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha <= MOST_ALPHA:
        raise ValueError(f"{file}: lora_alpha is {alpha!r}, it must be a positive number up to {MOST_ALPHA:g}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"{file}: lora_dropout is {dropout!r}, it must be at least 0 and below 1")
    base, stabilised = config.get("base_model_name_or_path"), config.get("use_rslora", False)
    if not isinstance(stabilised, bool):
        raise ValueError(f"{file}: use_rslora is {stabilised!r}, it must be true or false")
    return Lora(rank, float(alpha), float(dropout), stabilised=stabilised), base if isinstance(base, str) else ""


def read(folder: pathlib.Path, model: FastVLM, lora: Lora) -> tuple[Lora, dict[str, Any]]:
    """Reads the adapters of a model: (what they are, their Leaves as a tree).

    Args:
      lora: result of `read_config`.

    Raises:
      ValueError: a tensor is unknown or missing or has another shape than its kernel asks for, or only some layers have
        adapters; the message names it.
      FileNotFoundError: there is no adapter_model.safetensors.
    """
    tensors = open_weights(folder, STEM)
    modules = {}
    for name in tensors:
        suffix = next((suffix for suffix in PARTS.values() if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(BEFORE):
            raise ValueError(f"{folder}: tensor {name} is not of a LoRA adapter of a dense layer")
        modules[name.removeprefix(BEFORE).removesuffix(suffix)] = name
    rows = _kernels(model, modules)
    known = {name.removesuffix(".weight"): row for row in rows for name in row.names()}
    if unknown := sorted(set(modules) - set(known)):
        raise ValueError(f"{folder}: tensor {modules[unknown[0]]} adapts no dense layer of this base model")
    rows = [row for row in rows if any(name.removesuffix(".weight") in modules for name in row.names())]
    if left := [n for row in rows for n in row.names() if n.removesuffix(".weight") not in modules]:
        raise ValueError(
            f"{folder}: {left[0].removesuffix('.weight')} has no adapter and other layers have one: merge the adapters "
            "with `merge_and_unload()` of peft"
        )
    found = to_jax(adapter_rows(rows), tensors, _shapes(rows, shapes_of(model), lora.rank), folder)["params"]["lora"]
    paths = "|".join(re.escape(row.path.removeprefix("params/")) for row in rows)
    return lora._replace(targets=paths), found


def write(folder: pathlib.Path, model: FastVLM, lora: Lora, adapters: dict, base: str, dtype: str | None) -> None:
    """Writes adapters into `folder`, for transformers' model of the base, with `peft.PeftModel.from_pretrained`.

    Args:
      model: the model that they adapt; an encoder in folded form.
      adapters: their arrays or Leaves, as a tree.
      base: where the base is, for adapter_config.json.
      dtype: dtype of the stored tensors; None keeps each one's own.

    Raises:
      ValueError: transformers has no class for the model, or no module of an adapted name.
    """
    layouts = _layouts(model)
    if not layouts:
        raise ValueError("transformers has no class for this model, so peft has no names for its adapters")
    paths = {f"params/{path[:-2]}" for path in flatten_dict(adapters, sep="/") if path.endswith("/a")}
    if any(path.startswith("params/vision/") for path in paths) and model.vision_args.get("form") != "folded":
        raise ValueError(
            "the adapted encoder is in training form, which transformers does not have: use --layout hf, which folds it"
        )
    rows = [row for row in layouts[0] if row.path in paths]
    modules = "|".join(re.escape(row.torch.removesuffix(".weight")).replace(r"\{i\}", r"\d+") for row in rows)
    tensors = to_torch(adapter_rows(rows), {"params": {"lora": adapters}}, _shapes(rows, shapes_of(model), lora.rank))
    save_weights(folder, tensors, dtype, STEM)
    config = {
        "peft_type": "LORA",
        "task_type": None if model.vision_args else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.stabilised,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)


def _layouts(model: FastVLM) -> list[list[Row]]:
    """Returns the tables of names that a model's modules have in PyTorch, that of transformers first."""
    llm = Decoder(**model.llm_args, parent=None)
    if not model.vision_args:
        return [decoder_rows(llm, "model.")]
    vision = make_encoder(**model.vision_args, parent=None)
    if not isinstance(vision, FastViT):
        return []
    return [fastvlm.rows(vision, llm), llava.rows(vision, llm)]


def _kernels(model: FastVLM, modules: Mapping[str, str]) -> Sequence[Row]:
    """Returns the rows of all kernels in the layout that knows most of the modules."""
    layouts = [[r for r in rows if r.path and r.path.endswith("/kernel")] for rows in _layouts(model)]
    known = [sum(name.removesuffix(".weight") in modules for row in rows for name in row.names()) for rows in layouts]
    return layouts[known.index(max(known))] if layouts else []


def adapter_rows(kernels: Sequence[Row]) -> list[Row]:
    """Returns the rows of the adapters of kernels."""
    return [
        row._replace(
            torch=f"{BEFORE}{row.torch.removesuffix('.weight')}{suffix}",
            path=f"params/lora/{row.path.removeprefix('params/')}/{part}",
        )
        for row in kernels
        for part, suffix in PARTS.items()
    ]


def _shapes(kernels: Sequence[Row], shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of the adapters of kernels."""
    found = {}
    for row in kernels:
        *lead, inputs, outputs = shapes[row.path]
        path = f"params/lora/{row.path.removeprefix('params/')}"
        found |= {f"{path}/a": (*lead, inputs, rank), f"{path}/b": (*lead, rank, outputs)}
    return found
