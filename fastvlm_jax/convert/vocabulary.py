"""Adapts vocabulary and special tokens to PyTorch's layouts: an id for `<image>`, tied heads, ids in config.json."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.mapping import Tensor
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.generation_config import GenerationConfig


def with_image_token(processor: Processor, model_config: Mapping[str, Any]) -> Processor:
    """Returns a processor whose tokenizer has `<image>` on an id of the model's vocabulary, which keeps its rows.

    The answers still end at the same ids, which a generation_config.json then names.
    """
    rows = fastvlm.build(llm=model_config["llm"]).llm_args["vocab_size"]
    tokenizer = processor.tokenizer.with_image(rows)
    return with_generation(dataclasses.replace(processor, tokenizer=tokenizer), processor.end_ids)


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


def with_generation(processor: Processor, ends: tuple[int, ...]) -> Processor:
    """Returns a processor that has a generation_config.json: its own, or greedy decoding until any id in `ends`."""
    if processor.generation is not None:
        return processor
    eos = ends[0] if len(ends) == 1 else list(ends)
    settings = {"do_sample": False, **special_ids(processor), "eos_token_id": eos}
    return dataclasses.replace(processor, generation=GenerationConfig(settings))
