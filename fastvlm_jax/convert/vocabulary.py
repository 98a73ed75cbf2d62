"""Special tokens and rows of the vocabulary, as PyTorch's layouts want them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvlm_jax.convert.mapping import Tensor
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor


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


def drop_tied_head(llm: Decoder, tensors: dict[str, Tensor], embedding: str, source: pathlib.Path) -> None:
    """Takes out an lm_head.weight that only repeats the tied embedding; ValueError where it does not repeat it."""
    if not llm.tie_embeddings or (head := tensors.pop("lm_head.weight", None)) is None:
        return
    tied = tensors.get(embedding)
    if tied is None or head.get_dtype() != tied.get_dtype() or head[...].tobytes() != tied[...].tobytes():
        raise ValueError(
            f"{source}: config.json ties lm_head.weight to the embedding, but they differ: set tie_word_embeddings"
        )


def special_ids(processor: Processor) -> dict[str, int]:
    """bos, eos and pad as config.json names them; Qwen2 has no bos of its own, Llama pads with its unknown token."""
    tokenizer = processor.tokenizer
    pad = tokenizer.special_id(tokenizer.pad)
    return {
        "bos_token_id": pad if tokenizer.bos is None else tokenizer.bos,
        "eos_token_id": processor.end_id,
        "pad_token_id": pad,
    }
