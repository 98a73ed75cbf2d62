"""Text to ids and back, from a SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`.

Text never becomes a special token: `<|im_end|>` or `<image>` typed by a user is encoded as plain characters.
Special ids are asked for by name and are placed by the templates of conversation.py alone.
"""

import contextlib
import io
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
FILES = ("tokenizer.json", "tokenizer.model")

Offsets = list[tuple[int, int]]


class Tokenizer(Protocol):
    """What the package needs of a tokenizer; `load_tokenizer` gives one.

    Attributes:
      vocab_size: number of ids, special ones included; ids are in [0, vocab_size).
      files: the files to copy into a model directory.
    """

    vocab_size: int
    files: tuple[pathlib.Path, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, none of them special."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Returns ids and the `[start, end)` characters that each stands for.

        Bytes of one character that fell into several tokens: each token's span lies inside or at the start of it.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens are left out."""

    def special_id(self, name: str) -> int:
        """Returns the id of a special token such as `<|im_end|>`; ValueError if there is none of that name."""

    def save(self, folder: str | os.PathLike) -> None:
        """Copies `files` into `folder`."""


class SentencePieceTokenizer:
    """A SentencePiece model; its special tokens are its control symbols."""

    def __init__(self, path: pathlib.Path):
        self.files = (path,)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model") from error
        self.vocab_size = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0] if "▁" in text else self._model.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        ids, spans, at = [], [], 0
        # SentencePiece writes a space as U+2581 and could not tell a real U+2581 from it: that one goes as bytes.
        for part in re.split("(▁)", text):
            if part == "▁":
                ids += [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in part.encode()]
                spans += [(at, at + 1)] * 3
            elif part:
                # Offsets come in UTF-8 bytes; to_char[b] is the character that byte b belongs to.
                char_bytes = [len(char.encode()) for char in part] if not part.isascii() else [1] * len(part)
                to_char = np.append(np.repeat(np.arange(len(part)), char_bytes), len(part)) + at
                for piece in self._model.encode(part, return_type="proto").pieces:
                    ids.append(piece.id)
                    spans.append((int(to_char[piece.begin]), int(to_char[piece.end])))
            at += len(part)
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        model = self._model
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]  # a model's vocabulary may be padded beyond ours
        return model.decode([i for i in known if not model.is_control(i) and not model.is_unknown(i)])

    def special_id(self, name: str) -> int:
        found = self._model.piece_to_id(name)
        if not self._model.is_control(found):
            raise ValueError(_no_special(self.files[0], name))
        return found

    def save(self, folder: str | os.PathLike) -> None:
        _copy(self.files, folder)


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`; without `<image>` it gets one on the next free id, as FastVLM's export."""

    def __init__(self, path: pathlib.Path):
        self.files = (path,)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}".replace("\n", " ")) from error
        self._model.encode_special_tokens = True
        self._model.no_padding()
        self._model.no_truncation()
        if self._model.token_to_id(IMAGE) is None:
            self._model.add_special_tokens([IMAGE])
        added = self._model.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max(self._model.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def special_id(self, name: str) -> int:
        if name not in self._special:
            raise ValueError(_no_special(self.files[0], name))
        return self._special[name]

    def save(self, folder: str | os.PathLike) -> None:
        _copy(self.files, folder)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads a SentencePiece `.model` file, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    Raises:
      FileNotFoundError: there is no such file, or the folder holds neither.
      ValueError: the file is of neither kind.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no tokenizer in {path}: it needs a tokenizer.json or a tokenizer.model")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.json, a tokenizer.model or their folder")
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


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
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)


def _copy(files: Iterable[pathlib.Path], folder: str | os.PathLike) -> None:
    for file in files:
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(file, pathlib.Path(folder) / file.name)


def _no_special(path: pathlib.Path, name: str) -> str:
    return f"{path} has no special token {name}: choose a template that the tokenizer was made for"
