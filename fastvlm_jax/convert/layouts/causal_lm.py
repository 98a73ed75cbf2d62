"""Reads and writes transformers' plain language models (`Qwen2ForCausalLM`, `LlamaForCausalLM`), parents of stage 1."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.layouts.text_config import read_text_config, text_config
from fastvlm_jax.convert.mapping import described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.prefixes import with_usual_prefix
from fastvlm_jax.convert.tables.decoder import FIRST_NORM, decoder_rows
from fastvlm_jax.convert.vocabulary import drop_tied_head, special_ids, with_generation
from fastvlm_jax.convert.weight_files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor

INVERSE_FREQUENCIES = "rotary_emb.inv_freq"  # tensors of transformers before 4.32, ignored: rope_theta gives them


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a model directory, single file or shards: ({"llm": ..., "dtype": ...}, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown, damaged or not supported; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    model_config = {"llm": read_text_config(source / CONFIG, read_json(source / CONFIG)), "dtype": "float32"}
    tensors = {k: x for k, x in open_weights(source).items() if not k.endswith(INVERSE_FREQUENCIES)}
    tensors = with_usual_prefix(tensors, FIRST_NORM, "model.", source)
    model, shapes = described(model_config, source / CONFIG)
    llm = Decoder(**model.llm_args)
    drop_tied_head(llm, tensors, "model.embed_tokens.weight", source)
    return model_config, to_jax(decoder_rows(llm, "model."), tensors, shapes, source)


def write(
    folder: pathlib.Path, model_config: Mapping[str, Any], variables: dict, processor: Processor, dtype: str | None
) -> None:
    """Writes weights, config.json, generation_config.json and the tokenizer into `folder`.

    Args:
      folder: an existing folder.
      model_config, variables: a language model alone.
      processor: source of the special ids and of the tokenizer files.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: the vocabulary is too small for a special id, or the variables belong to another model.
    """
    model = fastvlm.build(llm=model_config["llm"])
    llm = Decoder(**model.llm_args)
    stored = save_weights(folder, to_torch(decoder_rows(llm, "model."), variables, shapes_of(model)), dtype)
    ids = special_ids(processor)
    config = text_config(llm, **ids)
    name = "Qwen2ForCausalLM" if llm.qkv_bias else "LlamaForCausalLM"
    write_json(folder / CONFIG, {"architectures": [name], "dtype": stored, **config})
    with_generation(processor, processor.end_ids).save(folder, export=True)
