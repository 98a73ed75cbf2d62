"""Splits texts into words, between which byte-level BPE merges nothing, as published tokenizers do."""

import json
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from fastvlm_jax.text.tokenizer_config import QWEN2_WORDS

KINDS = ("qwen2", "smollm", "gpt2")


def split_words(model: tokenizers.Tokenizer, kind: str) -> None:
    """Lets `model` split texts into words as the tokenizers of a kind in KINDS do."""
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
    if kind == "qwen2":
        model.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone])
    elif kind == "smollm":
        model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_alone])
    else:
        model.pre_tokenizer = bytes_alone


def kind_of(model: tokenizers.Tokenizer) -> str | None:
    """Returns the kind in KINDS whose words a byte-level BPE tokenizer splits texts into; None if it is another."""
    for kind in KINDS:
        known = tokenizers.Tokenizer(models.BPE())
        split_words(known, kind)
        if _steps(known) == _steps(model):
            return kind
    return None


def _steps(model: tokenizers.Tokenizer) -> list[Any]:
    """Returns the normalizer of `model` and its steps of splitting, without a setting of offsets that changes no id."""
    form, words = ({} if x is None else json.loads(x.__getstate__()) for x in (model.normalizer, model.pre_tokenizer))
    steps = words.get("pretokenizers", [words])
    return [form, *({key: value for key, value in step.items() if key != "trim_offsets"} for step in steps)]
