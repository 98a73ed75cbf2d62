"""Reads the tokenizer inside a GGUF file, llama.cpp's file format."""

import os
import pathlib
from typing import Any

import numpy as np

from fastvlm_jax.gguf_file import read_contents, short
from fastvlm_jax.text.bpe import JsonTokenizer, bpe_tokenizer

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types: special, added but allowed in text, filler
WORDS = {"qwen2": "qwen2", "smollm": "smollm", "gpt-2": "gpt2"}  # `tokenizer.ggml.pre` -> kind of bpe_tokenizer


def read_gguf_tokenizer(file: str | os.PathLike) -> JsonTokenizer:
    """Reads the byte-level BPE tokenizer inside a GGUF file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or a key is missing, damaged or describes another kind of tokenizer; the message
        names the file and the key.
    """
    file = pathlib.Path(file).expanduser()
    metadata = read_contents(file).metadata
    prefix = "tokenizer.ggml."

    def table(key: str, kind: type) -> Any:
        value = metadata.get(prefix + key)
        if not isinstance(value, kind) or (kind is not str and not len(value)):
            raise ValueError(f"{file}: {prefix}{key} is {short(value)}: no byte-level BPE tokenizer can be read")
        return value

    model, words = table("model", str), table("pre", str)
    if model != "gpt2" or words not in WORDS:
        raise ValueError(
            f"{file}: its tokenizer is of the kind {model!r}, {words!r}; only 'gpt2' with {' or '.join(WORDS)} can be "
            "read: put the model's own tokenizer.json or tokenizer.model beside the file"
        )
    tokens, merges, types = table("tokens", list), table("merges", list), table("token_type", np.ndarray)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{file}: {prefix}tokens and {prefix}token_type differ in length, or a token occurs twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"{file}: {prefix}merges has {short(wrong[0])}, which is not a pair")
    added = {tokens[i]: i for i in map(int, np.flatnonzero((types == CONTROL) | (types == USER_DEFINED)))}
    words_end = max((i for i in range(len(tokens)) if tokens[i] not in added and types[i] != UNUSED), default=-1)
    vocab = {token: i for i, token in enumerate(tokens[: words_end + 1])}
    plain = {token for token, i in added.items() if types[i] == USER_DEFINED}
    config: dict[str, Any] = {"add_bos_token": metadata.get(f"{prefix}add_bos_token", False)}
    for name in ("bos", "eos"):
        at = metadata.get(f"{prefix}{name}_token_id")
        if type(at) is int and 0 <= at < len(tokens):
            config[f"{name}_token"] = tokens[at]
    return bpe_tokenizer(vocab, pairs, added, WORDS[words], file, plain=plain, config=config)
