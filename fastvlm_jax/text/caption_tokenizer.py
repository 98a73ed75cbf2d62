"""Turns captions into the tokens that a text tower reads, with CLIP's vocabulary or with any other tokenizer.

a photo    ->    START  a  photo  END  padding ...        the tower reads its feature at END, the largest id
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fastvlm_jax.text.clip_tokenizer import VOCABULARY, is_clip_vocabulary, load_clip_tokenizer
from fastvlm_jax.text.tokenizer import READERS, Tokenizer, load_tokenizer


class CaptionTokenizer(Protocol):
    """Describes what turns captions into tokens.

    Attributes:
      vocab_size: number of ids; the largest one ends a text.
    """

    vocab_size: int

    def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Returns int32 [N, context_length]: start, text, end, padding; the end is kept if a text is cut."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files, in a new folder too, from which `load_caption_tokenizer` loads the same tokenizer."""


class OwnCaptionTokenizer:
    """Gives captions of a tokenizer that is not CLIP's the start and end tokens of a text tower.

    They take the two ids behind those of the tokenizer, so that the end token has the largest id of all, where the
    tower reads its feature.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.vocab_size, tokenizer.vocab_size + 1
        self.vocab_size = tokenizer.vocab_size + 2
        self._pad = tokenizer.special_id(tokenizer.pad)

    def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Returns int32 [N, context_length]; see `CaptionTokenizer`."""
        ids = np.full((len(texts), context_length), self._pad, np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = [self.start, *self.tokenizer.encode(text)[: context_length - 2], self.end]
            row[: len(tokens)] = tokens
        return ids

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files of the tokenizer."""
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)


def load_caption_tokenizer(path: str | os.PathLike) -> CaptionTokenizer:
    """Loads what turns captions into tokens.

    Args:
      path: CLIP's own vocabulary, bpe_simple_vocab_16e6.txt.gz or the merges.txt of a transformers CLIP; a folder or a
        training workdir that holds it; or any path that `load_tokenizer` takes.

    Raises:
      FileNotFoundError: there is no such file, or the folder holds no tokenizer.
      ValueError: the file is damaged or holds something else.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file() and path.suffix in (".gz", ".txt"):
        return load_clip_tokenizer(path)
    for folder in (path, path / "processor"):  # the second in a training workdir
        if file := clip_file(folder):
            return load_clip_tokenizer(file)
    try:
        return OwnCaptionTokenizer(load_tokenizer(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or {VOCABULARY} or a merges.txt, for CLIP's vocabulary") from error


def clip_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the file of a folder with CLIP's vocabulary; None if there is none. Qwen2 has a merges.txt too."""
    if (folder / VOCABULARY).is_file():
        return folder / VOCABULARY
    merges = folder / "merges.txt"
    alone = merges.is_file() and not any((folder / name).is_file() for name in READERS)
    return merges if alone or (merges.is_file() and is_clip_vocabulary(merges)) else None
