"""Loads the tokenizers of Qwen2, Llama, Vicuna and SmolLM2, and trains new ones.

Text never becomes a special token: `<|im_end|>` or `<image>` typed by a user is encoded as plain characters.
Only the templates of conversation.py place special ids, which they look up by name.
"""

import io
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import sentencepiece
import tokenizers

from fastvlm_jax.files import refuse_pointer, write_whole
from fastvlm_jax.text import bpe
from fastvlm_jax.text.bpe import END, IMAGE, PAD, START, Offsets, bpe_tokenizer
from fastvlm_jax.text.gguf import read_gguf_tokenizer
from fastvlm_jax.text.spm import SentencePieceTokenizer
from fastvlm_jax.text.tokenizer_config import warn_not_computed

__all__ = ["END", "IMAGE", "PAD", "START", "Tokenizer", "bpe_tokenizer", "load_tokenizer", "train_sentencepiece"]

READERS = {
    "tokenizer.json": bpe.read_json,
    "tokenizer.model": SentencePieceTokenizer,
    "qwen.tiktoken": bpe.read_tiktoken,
    "vocab.json": bpe.read_vocab_and_merges,
}
GGUF = ".gguf"


class Tokenizer(Protocol):
    """Describes the tokenizers of this package, which `load_tokenizer` returns.

    Attributes:
      vocab_size: number of ids, special ones included; ids are in [0, vocab_size).
      files: the file that the tokenizer was read from.
      config: contents of the tokenizer_config.json beside it; {} if there is none.
      bos: id that starts every sequence (Llama's `<s>`); None if there is none.
      end: name of the special token that ends a turn: `<|im_end|>`, or `</s>` for Llama and Vicuna.
      pad: name of the special token for padding, which is never read.
      image: name of the token at an image's placeholders: `<image>`, or `pad` if the vocabulary has no such token.
      image_id: id of `image`, always inside the vocabulary.
      prefix_once: whether a space is put before the first text of a conversation and before a text behind an image,
        but not before one behind a special token (Llama's with `legacy: false`).
    """

    vocab_size: int
    files: tuple[pathlib.Path, ...]
    config: Mapping[str, Any]
    bos: int | None
    end: str
    pad: str
    image: str
    image_id: int
    prefix_once: bool

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, none of them special; raises ValueError for half a surrogate pair."""

    def encode_with_offsets(self, text: str, behind_special: bool = False) -> tuple[list[int], Offsets]:
        """Returns the ids of `text` and, for each, the span `[start, end)` of characters that it encodes.

        `behind_special` says that a special token precedes the text, see `prefix_once`.

        If several tokens share the bytes of one character, each span is the character or empty at its start.
        If Unicode's NFC form joins a letter and its combining mark, the span is the letter's.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without the special tokens."""

    def special_id(self, name: str) -> int:
        """Returns the id of a special token such as `<|im_end|>`; raises ValueError if there is none of that name."""

    def with_image(self, rows: int) -> "Tokenizer":
        """Returns this tokenizer with `<image>`, which transformers requires, on an id below `rows`.

        Raises:
          ValueError: the model has fewer rows than the tokenizer ids.
        """

    def library(self) -> tokenizers.Tokenizer:
        """Returns the same tokenizer as one of the library `tokenizers`, which must not be changed."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files from which `load_tokenizer` and transformers' AutoTokenizer load the same tokenizer."""


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads a `tokenizer.json`, a SentencePiece `.model`, a `.tiktoken`, a `vocab.json`, or the tokenizer of a `.gguf`.

    Args:
      path: that file, a folder that holds one, or a training workdir. Tokenizer files beside a `.gguf` come before the
        tokenizer in it.

    A warning names settings of its tokenizer_config.json that would change ids or answers and are not computed.

    Raises:
      FileNotFoundError: there is no such file, or the folder holds no tokenizer.
      ValueError: the file does not hold the kind of tokenizer that its name says.
    """
    path = pathlib.Path(path).expanduser()
    warn_not_computed(path if path.is_dir() else path.parent)
    if path.suffix == GGUF and path.is_file():
        beside = [name for name in READERS if (path.parent / name).is_file()]
        return _load_folder(path.parent, beside) if beside else read_gguf_tokenizer(path)
    if path.is_file():
        by_suffix = {".json": bpe.read_json, ".tiktoken": bpe.read_tiktoken}
        refuse_pointer(path)
        return READERS.get(path.name, by_suffix.get(path.suffix, SentencePieceTokenizer))(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no tokenizer at {path}: give one of {', '.join(READERS)}, a .gguf or its folder")
    for folder in (path, path / "processor"):  # the second in a training workdir
        if found := [name for name in READERS if (folder / name).is_file()]:
            return _load_folder(folder, found)
    if len(files := list(path.glob(f"*{GGUF}"))) == 1:
        return read_gguf_tokenizer(files[0])
    lora = " (the folder of a LoRA adapter: give its base model)" if (path / "adapter_config.json").is_file() else ""
    raise FileNotFoundError(f"no tokenizer in {path}: it needs one of {', '.join(READERS)} or a .gguf{lora}")


def _load_folder(folder: pathlib.Path, found: list[str]) -> Tokenizer:
    """Loads the tokenizer of a folder that holds the files `found`, in the order of READERS."""
    for name in found:
        refuse_pointer(folder / name)
    tokenizer = READERS[found[0]](folder / found[0])
    if found[:2] == ["tokenizer.json", "tokenizer.model"]:
        # The SentencePiece model is the original, but tokenizer.json may hold tokens that were added later.
        original = SentencePieceTokenizer(folder / "tokenizer.model")
        return original if original.vocab_size >= tokenizer.vocab_size else tokenizer
    return tokenizer


def train_sentencepiece(
    lines: Iterable[str], path: str | os.PathLike, vocab_size: int, *, word_start: bool = False
) -> None:
    """Trains a lossless byte-fallback BPE tokenizer on `lines` and writes it to `path`, the same bytes each time.

    `decode(encode(x)) == x` for any text: no normalisation, no added or removed space, unknown characters as bytes.
    Texts too few to fill `vocab_size` give a smaller vocabulary. Special ids: PAD 0, START 2, END 3, IMAGE 4.

    Args:
      word_start: whether a text begins with a space of its own, as Llama's do: "cat" and the end of "a cat" are then
        the same token. For captions, which are not continued.

    Raises:
      ValueError: `lines` holds no text, or `vocab_size` has no room for the 256 bytes, the characters and the special
        tokens.
    """
    lines = [part for line in lines for part in line.split("\n") if part]  # a newline stays a token of its own
    if not lines:
        raise ValueError("no text to train a tokenizer on")
    needed = 256 + 5 + len(set("".join(lines).replace(" ", "▁")))
    if vocab_size < needed:
        raise ValueError(f"vocab_size {vocab_size} is too small for these texts: it needs at least {needed}")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=word_start,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,  # bytes; longer lines are dropped without a warning
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece=PAD,
        control_symbols=[START, END, IMAGE],
        num_threads=1,
        minloglevel=2,
    )
    write_whole(path, model.getvalue())
