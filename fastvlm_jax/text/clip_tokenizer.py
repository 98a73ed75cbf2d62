"""Provides CLIP's text tokenizer: lower-cased byte-level BPE with 49,408 ids, like open_clip's SimpleTokenizer."""

import gzip
import html
import os
import pathlib
import zlib
from collections.abc import Sequence

import ftfy
import numpy as np
import regex
import tokenizers
from tokenizers import models, pre_tokenizers

from fastvlm_jax.files import write_whole
from fastvlm_jax.text.bpe import byte_spelling

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # as open_clip calls it
MERGES = "merges.txt"
NUM_MERGES = 48_894
MAX_BYTES = 1 << 24  # limit of the unpacked merges file; CLIP's has 3 MB
START, END = 49_406, 49_407
CONTEXT_LENGTH = 77

_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class ClipTokenizer:
    """Holds CLIP's vocabulary and converts text to the ids that a CLIP text encoder reads.

    The names of the start and end tokens in a text stay plain characters; open_clip turns them into special tokens.
    """

    vocab_size = 49_408

    def __init__(self, merges: Sequence[tuple[str, str]], source: pathlib.Path):
        """Builds the tokenizer from CLIP's merges, in merge order; error messages name the file `source`.

        Raises:
          ValueError: the merges are not CLIP's.
        """
        self._merges = tuple(merges)
        # CLIP's order of ids: bytes (printable ones sort first), bytes that end a word, merges.
        single = sorted(byte_spelling())
        names = [*single, *(char + "</w>" for char in single), *(left + right for left, right in merges)]
        try:
            bpe = models.BPE({name: i for i, name in enumerate(names)}, list(merges), end_of_word_suffix="</w>")
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{source} is not CLIP's vocabulary: {error}".replace("\n", " ")) from error
        self._model = tokenizers.Tokenizer(bpe)
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without START and END, after repairing its encoding, spaces and case."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = _WORDS.findall(" ".join(text.split()).lower())
        return self._model.encode(words, is_pretokenized=True).ids

    def __call__(self, texts: Sequence[str] | str, context_length: int = CONTEXT_LENGTH) -> np.ndarray:
        """Returns int32 [N, context_length]: START, the ids of the text, END, zeros; END is kept if a text is cut."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = np.zeros((len(texts), context_length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = [START, *self.encode(text)[: context_length - 2], END]
            row[: len(tokens)] = tokens
        return ids

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the merges.txt from which `load_clip_tokenizer` loads the same tokenizer."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["#version: 0.2", *map(" ".join, self._merges)]
        write_whole(folder / MERGES, ("\n".join(lines) + "\n").encode())


def load_clip_tokenizer(path: str | os.PathLike) -> ClipTokenizer:
    """Reads open_clip's `bpe_simple_vocab_16e6.txt.gz`, or the `merges.txt` of a transformers CLIP or in its folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or holds another vocabulary.
    """
    path = pathlib.Path(path).expanduser()
    path = path / MERGES if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP vocabulary at {path}: give {VOCABULARY} or a {MERGES}")
    # The file may hold more merges than CLIP uses.
    merges = [tuple(line.split()) for line in _read_lines(path)[:NUM_MERGES]]
    if len(merges) < NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{path} is not CLIP's vocabulary: it needs {NUM_MERGES} lines of two tokens")
    return ClipTokenizer(merges, path)


def is_clip_vocabulary(path: pathlib.Path) -> bool:
    """Returns whether a merges.txt holds as many merges as CLIP's, some of which end a word."""
    try:
        lines = [line for line in _read_lines(path) if line]
    except ValueError:
        return False
    return len(lines) == NUM_MERGES and any(line.endswith("</w>") for line in lines)


def _read_lines(path: pathlib.Path) -> list[str]:
    """Returns the lines of a file of merges without the first, which is a version."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return data.decode("utf-8").split("\n")[1:]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is not CLIP's vocabulary: {error}") from error
