"""Imports and exports models: each layout has one mapping table, read forwards to import and backwards to export."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fastvlm_jax.convert.heads import require_projection
from fastvlm_jax.convert.layouts import (
    causal_lm,
    fastvlm,
    gguf,
    gguf_export,
    llava,
    mobileclip,
    native,
    openclip,
    peft,
    timm,
    vit,
)
from fastvlm_jax.convert.layouts.native import read_lineage
from fastvlm_jax.convert.new_folder import new_folder
from fastvlm_jax.convert.recognise import recognise
from fastvlm_jax.convert.vocabulary import with_image_token
from fastvlm_jax.convert.weight_files import DTYPES
from fastvlm_jax.loaded import Adapters
from fastvlm_jax.models import kinds
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor

__all__ = ["LAYOUTS", "load_weights", "read_lineage", "recognise", "write"]


READERS = {
    "native": native.read,
    "fastvlm": fastvlm.read,
    "llava": llava.read,
    "decoder": causal_lm.read,
    "gguf": gguf.read,
    "vit": vit.read,
    "timm": timm.read,
    "openclip": openclip.read,
    "mobileclip": mobileclip.read,
}
LAYOUTS = ("native", "hf", "llava", "timm", "openclip", "gguf", "peft")  # layouts that `write` knows


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Opens a model directory or GGUF file of any layout: (model_config, variables as Leaves).

    Raises:
      FileNotFoundError, ValueError: see `recognise` and the `read` of the layout.
    """
    return READERS[recognise(path)](path)


def write(
    target: str | os.PathLike,
    layout: str,
    variables: dict,
    model_config: Mapping[str, Any],
    processor: Processor | PairProcessor | None,
    lineage: Mapping[str, Any],
    *,
    dtype: str | None = None,
    fold: bool = False,
    overwrite: bool = False,
    adapters: Adapters | None = None,
    gguf_type: str | None = None,
) -> None:
    """Writes a model directory, completely or not at all.

    Args:
      target: a folder that does not exist or is empty; with `overwrite`, a model directory to replace.
      layout: one of LAYOUTS. "hf" writes a whole model as FastVLM, a part as a plain language model or ViT; "timm"
        writes the encoder of any model, and "openclip" too, but for a CLIP both towers; "gguf" writes the language
        model of any model, and "peft" adapters alone, with the processor.
      variables: variables of `kinds.build(**model_config)`: arrays, boxed or not, or Leaves.
      model_config: {"vision": ..., "llm": ..., "dtype": ...}, or that of a CLIP; an absent part is None or left out.
      processor: tokenizer, template and image settings; a PairProcessor or None for a CLIP, None for an encoder alone.
      lineage: JSON values that say where the weights come from; the native layout stores them, "gguf" two of them.
      dtype: dtype of the stored weights, "float32", "bfloat16" or "float16"; None keeps each tensor's own.
      fold: whether to fold a branched encoder; "hf" and "llava" always fold whole models.
      overwrite: whether a model at `target` may be replaced.
      adapters: the adapters that `variables` contain, if they are known apart.
      gguf_type: type of the matrices in a GGUF file, "f16" by default, "f32", "bf16" or "q8_0".

    Raises:
      ValueError: the layout cannot hold the model or one of its sizes, a tokenizer or projector is missing, or the
        target is occupied.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    if layout == "peft":
        _write_peft(target, model_config, adapters, processor, dtype, overwrite)
        return
    variables = nn.unbox(variables)
    parts = {name for name in ("vision", "llm", "text") if model_config.get(name)}
    family = (model_config.get("vision") or {}).get("family", "fastvit")
    _refuse(layout, parts, family)
    _check_types(layout, dtype, gguf_type)
    if layout == "timm" or (layout == "openclip" and "text" not in parts):
        model_config, variables = _part(model_config, variables, "vision")
        parts = {"vision"}
    elif layout == "gguf":
        model_config, variables = _part(model_config, variables, "llm")
        parts = {"llm"}
    whole = parts == {"vision", "llm"}
    if "text" in parts:
        require_projection(model_config, variables, "this CLIP")
    if whole and "projector" not in variables["params"]:
        raise ValueError("the model has no projector: train one (configs/stage1_align.py) with it as --config.parent")
    branched = (
        family == "fastvit" and "vision" in parts and model_config["vision"].get("form", "branched") == "branched"
    )
    if branched and (fold or (whole and layout in ("hf", "llava"))):
        dtype = dtype or _common_dtype(variables)
        variables = fold_variables(variables)
        model_config = {**model_config, "vision": {**model_config["vision"], "form": "folded"}}
    if processor is None and "llm" in parts and layout != "native":
        reader = "a GGUF file" if layout == "gguf" else "PyTorch"
        raise ValueError(
            f"the model has no tokenizer, and {reader} needs one: put tokenizer.json beside its config.json"
        )
    with new_folder(target, overwrite) as folder:
        if layout == "gguf":
            name = pathlib.Path(target).expanduser().resolve().name
            gguf_export.write(folder, model_config, variables, processor, lineage, name, gguf_type or "f16")
        else:
            _write(folder, layout, parts, variables, model_config, processor, lineage, dtype)


def _write_peft(
    target,
    model_config: Mapping[str, Any],
    adapters: Adapters | None,
    processor: Processor | None,
    dtype,
    overwrite: bool,
) -> None:
    """Writes adapters alone, and the processor, whose images need not be as large as the base's; see `write`."""
    if adapters is None:
        raise ValueError("this model has no adapters apart from its kernels: give a workdir that trained them (lora)")
    if adapters.others:
        raise ValueError(
            f"{adapters.others[0]} was trained beside the adapters, and peft's layout has no place for it: use "
            "--layout hf, which holds the whole model with the adapters merged"
        )
    with new_folder(target, overwrite) as folder:
        peft.write(folder, kinds.build(**model_config), adapters.lora, adapters.params, adapters.base, dtype)
        if processor is not None:
            seeing = with_image_token(processor, model_config) if model_config.get("vision") else processor
            seeing.save(folder, export=True)


def _refuse(layout: str, parts: set[str], family: str) -> None:
    """Raises ValueError if a layout cannot hold a model of these parts with an encoder of this family."""
    whole, clip = parts == {"vision", "llm"}, "text" in parts
    if clip and layout in ("hf", "llava"):
        raise ValueError(f"the {layout} layout holds no CLIP: use --layout openclip or native, or timm for its encoder")
    if layout == "llava" and not whole:
        raise ValueError(f"the llava layout holds whole models only, this is {' and '.join(parts)} alone")
    if layout == "gguf" and "llm" not in parts:
        raise ValueError("the gguf layout holds a language model, and this model has none")
    if layout in ("timm", "openclip"):
        if "vision" not in parts:
            raise ValueError(f"the {layout} layout holds an encoder, and this model has none")
        if family == "vit":
            alone = "--source vision=DIR --layout hf for the encoder"
            other = f"--layout native, or {alone}" if whole or clip else "--layout hf"
            raise ValueError(f"{layout} has no names for this vision transformer: use {other}")
    if layout == "openclip" and clip and family != "fastvit":
        alone = "--source vision=DIR --layout openclip for the encoder"
        raise ValueError(f"openclip has no names for the image_head of this {family}: use --layout native, or {alone}")
    if layout == "hf" and ((whole and family != "fastvit") or (parts == {"vision"} and family != "vit")):
        other = "native" if whole else "timm or native"
        raise ValueError(f"transformers has no class for this {family} model: use --layout {other}")


def _write(folder: pathlib.Path, layout, parts, variables, model_config, processor, lineage, dtype) -> None:
    if layout == "native":
        native.write(folder, variables, model_config, lineage, dtype)
        if processor is not None:
            processor.save(folder)
    elif layout == "llava":
        llava.write(folder, model_config, variables, processor, dtype)
    elif layout == "timm":
        timm.write(folder, model_config, variables, dtype)
    elif layout == "openclip":
        pairs = processor if isinstance(processor, PairProcessor) else None
        openclip.write(folder, model_config, variables, dtype, pairs)
    elif parts == {"llm"}:
        causal_lm.write(folder, model_config, variables, processor, dtype)
    elif parts == {"vision"}:
        vit.write(folder, model_config, variables, dtype)
    else:
        fastvlm.write(folder, model_config, variables, processor, dtype)


def _check_types(layout: str, dtype: str | None, gguf_type: str | None) -> None:
    """Raises ValueError for a type of the weights that the layout does not know."""
    if layout == "gguf" and dtype is not None:
        raise ValueError(f"dtype={dtype!r} has no meaning for gguf: --gguf_type is the type of its matrices")
    if layout != "gguf" and gguf_type is not None:
        raise ValueError(f"gguf_type={gguf_type!r} has no meaning for {layout}: --dtype is the type of its weights")
    if gguf_type not in (None, *gguf_export.TYPES):
        raise ValueError(f"gguf_type={gguf_type!r} must be one of {', '.join(gguf_export.TYPES)}")


def _part(model_config: Mapping[str, Any], variables: dict, part: str) -> tuple[dict[str, Any], dict]:
    """Returns the config and variables of one part of a model; counters belong to no part and are kept."""
    kept = {
        name: tree if name == "counters" else {part: tree[part]}
        for name, tree in variables.items()
        if name == "counters" or part in tree
    }
    return {part: model_config[part], "dtype": model_config.get("dtype", "float32")}, kept


def _common_dtype(variables: dict) -> str | None:
    """Returns the name of the dtype that all floating variables share, or None."""
    found = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(variables)} & set(DTYPES.values())
    return next(name for name, dtype in DTYPES.items() if dtype in found) if len(found) == 1 else None
