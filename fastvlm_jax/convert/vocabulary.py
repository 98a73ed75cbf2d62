"""Adapts vocabulary and special tokens to PyTorch's layouts: a row for `<image>`, tied heads, ids in config.json."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvlm_jax.convert.mapping import Tensor
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.generation_config import GenerationConfig


def with_image_token(
    processor: Processor, model_config: Mapping[str, Any], variables: dict
) -> tuple[Processor, Mapping[str, Any], dict]:
    """Adds `<image>` to the tokenizer, on the next free id, unless it has one, and a row for it to the model.

    Returns:
      (processor, model_config, variables).
    """
    processor = dataclasses.replace(processor, tokenizer=processor.tokenizer.with_image())
    return processor, *with_room_for(processor.tokenizer.image_id, model_config, variables)


def with_room_for(token: int, model_config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """Enlarges the vocabulary until it holds the id `token`: rows are added in multiples of 64.

    The added rows of the embedding and columns of the head are copies of the first one: an added id has the same logit
    as id 0 and is never the likeliest alone. Vicuna's vocabulary of 32,000 has no `<image>`; the published conversions
    add rows to the embedding and the head too.

    Returns:
      (model_config, variables); the given ones if the vocabulary is large enough.
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
    """Removes lm_head.weight from `tensors` if the head is tied to the embedding.

    Args:
      llm: the language model; nothing is removed unless its embeddings are tied.
      tensors: the checkpoint's tensors by name, changed in place.
      embedding: name of the embedding among them.
      source: the checkpoint, for messages.

    Raises:
      ValueError: lm_head.weight differs from the embedding that it is tied to.
    """
    if not llm.tie_embeddings or (head := tensors.pop("lm_head.weight", None)) is None:
        return
    tied = tensors.get(embedding)
    if tied is None or head.get_dtype() != tied.get_dtype() or head[...].tobytes() != tied[...].tobytes():
        raise ValueError(
            f"{source}: config.json ties lm_head.weight to the embedding, but they differ: "
            "set tie_word_embeddings to false in it"
        )


def special_ids(processor: Processor) -> dict[str, int]:
    """Returns the ids of bos, eos and pad under config.json's keys.

    Qwen2 has no bos of its own: its pad id stands in. Llama pads with its unknown token.
    """
    tokenizer = processor.tokenizer
    pad = tokenizer.special_id(tokenizer.pad)
    return {
        "bos_token_id": pad if tokenizer.bos is None else tokenizer.bos,
        "eos_token_id": processor.end_id,
        "pad_token_id": pad,
    }


def with_generation(processor: Processor, ids: Mapping[str, int]) -> Processor:
    """Returns a processor that has a generation_config.json: its own, or greedy decoding until any of its `end_ids`.

    Args:
      ids: result of `special_ids`.
    """
    if processor.generation is not None:
        return processor
    ends = processor.end_ids
    eos = ends[0] if len(ends) == 1 else list(ends)
    return dataclasses.replace(processor, generation=GenerationConfig({"do_sample": False, **ids, "eos_token_id": eos}))
