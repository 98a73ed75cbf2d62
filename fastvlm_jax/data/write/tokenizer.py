"""Trains the tokenizer of a small model on the texts of a data set, for training from scratch without a parent."""

import os
import pathlib

from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.text.tokenizer import train_sentencepiece

FILE = "tokenizer.model"
# Words that templates put around every question; the tokenizer is trained on them, so that each is one token.
TEMPLATE_WORDS = ["user", "assistant", "system", "You are a helpful assistant."]
_RECORDS = 20_000  # records that are read; the first of a larger split


def write_tokenizer(folder: str | os.PathLike, vocab_size: int = 512, split: str = "train") -> pathlib.Path:
    """Trains a tokenizer on the texts of a split and writes it to the data set's folder, where training looks for it.

    Returns:
      Path of the tokenizer.

    Raises:
      FileNotFoundError: there is no such data set.
      ValueError: the folder holds a tokenizer already, the split holds no text, or `vocab_size` has no room for its
        characters.
    """
    path = pathlib.Path(folder).expanduser() / FILE
    if path.exists():
        raise ValueError(f"{path} is there already: delete it to train another")
    records = read_shards(folder, split)
    texts = []
    for number in range(min(len(records), _RECORDS)):
        turns = records[number].turns
        texts += [part for _, content in turns for part in content if isinstance(part, str)] + TEMPLATE_WORDS
    try:
        train_sentencepiece(texts, path, vocab_size)
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}; give --vocab_size, and the same to --config.model.llm.vocab_size"
        ) from error
    return path
