"""Text to ids and back, from the tokenizer files of Qwen2, Llama, Vicuna and SmolLM2, or from one trained here.

Text never becomes a special token: `<|im_end|>` or `<image>` typed by a user is encoded as plain characters.
Special ids are asked for by name and are placed by the templates of conversation.py alone.
"""

import io
import os
import pathlib
from collections.abc import Iterable
from typing import Protocol

import sentencepiece

from fastvlm_jax.files import write_whole
from fastvlm_jax.text import bpe
from fastvlm_jax.text.bpe import END, IMAGE, PAD, START, Offsets, bpe_tokenizer
from fastvlm_jax.text.spm import SentencePieceTokenizer

__all__ = ["END", "IMAGE", "PAD", "START", "Tokenizer", "bpe_tokenizer", "load_tokenizer", "train_sentencepiece"]

READERS = {
    "tokenizer.json": bpe.read_json,
    "tokenizer.model": SentencePieceTokenizer,
    "qwen.tiktoken": bpe.read_tiktoken,
    "vocab.json": bpe.read_vocab_and_merges,
}


class Tokenizer(Protocol):
    """What the package needs of a tokenizer; `load_tokenizer` gives one.

    Attributes:
      vocab_size: number of ids, special ones included; ids are in [0, vocab_size).
      files: the file it was read from.
      bos: the id that starts every sequence (Llama's `<s>`), None where there is none.
      end: name of the special token that ends a turn: `<|im_end|>`, or `</s>` for Llama and Vicuna.
      pad: name of the special token that fills places which are never read.
      image: name of the token at an image's placeholders: `<image>`, or `pad` where the vocabulary has no such token.
      image_id: its id, always inside the vocabulary.
    """

    vocab_size: int
    files: tuple[pathlib.Path, ...]
    bos: int | None
    end: str
    pad: str
    image: str
    image_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, none of them special; ValueError for half a surrogate pair."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Returns ids and the `[start, end)` characters that each stands for.

        Bytes of one character that fell into several tokens: each token's span lies inside or at the start of it.
        A letter and its mark that Unicode's NFC form joins: the span is the letter's.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens are left out."""

    def special_id(self, name: str) -> int:
        """Returns the id of a special token such as `<|im_end|>`; ValueError if there is none of that name."""

    def with_image(self) -> "Tokenizer":
        """Returns the tokenizer with `<image>`, on the next free id where it had none, as transformers wants it.

        That id may lie behind the model's vocabulary, which then needs another row.
        """

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer` and transformers' AutoTokenizer read the same tokenizer from."""


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads a `tokenizer.json`, a SentencePiece `.model`, a `.tiktoken`, a `vocab.json`, or a folder that holds one.

    Raises:
      FileNotFoundError: there is no such file, or the folder holds none.
      ValueError: the file is not what its name says.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        by_suffix = {".json": bpe.read_json, ".tiktoken": bpe.read_tiktoken}
        return READERS.get(path.name, by_suffix.get(path.suffix, SentencePieceTokenizer))(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no tokenizer at {path}: give a {', '.join(READERS)} or their folder")
    found = [name for name in READERS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no tokenizer in {path}: it needs one of {', '.join(READERS)}")
    tokenizer = READERS[found[0]](path / found[0])
    if found[:2] == ["tokenizer.json", "tokenizer.model"]:
        # The SentencePiece model is the original, unless tokens were added to it since.
        original = SentencePieceTokenizer(path / "tokenizer.model")
        return original if original.vocab_size >= tokenizer.vocab_size else tokenizer
    return tokenizer


def train_sentencepiece(lines: Iterable[str], path: str | os.PathLike, vocab_size: int) -> None:
    """Trains a lossless byte-fallback BPE tokenizer on `lines` and writes it to `path`, the same bytes each time.

    `decode(encode(x)) == x` for any text: no normalisation, no added or removed space, unknown characters as bytes.
    Texts too few to fill `vocab_size` give a smaller vocabulary. Special ids: PAD is 0, then START, END, IMAGE.

    Raises:
      ValueError: no text at all, or `vocab_size` has no room for the 256 bytes, the characters and the special tokens.
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
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,  # longer lines are dropped without a word
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
