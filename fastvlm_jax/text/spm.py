"""Reads and saves SentencePiece BPE models: Llama's and Vicuna's `tokenizer.model`, and models trained here."""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as spm_format
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastvlm_jax.files import read_small
from fastvlm_jax.text.bpe import END, IMAGE, MAX_TOKEN, PAD, JsonTokenizer, Offsets, no_special, with_image
from fastvlm_jax.text.tokenizer_config import CONFIG, SPACE, prefix_scheme, read_settings, write_tokenizer

_PIECE = spm_format.ModelProto.SentencePiece
_NORMAL, _CONTROL, _UNKNOWN, _BYTE = _PIECE.NORMAL, _PIECE.CONTROL, _PIECE.UNKNOWN, _PIECE.BYTE


class SentencePieceTokenizer:
    """Holds a SentencePiece BPE model, whose special tokens are its control symbols and its unknown token.

    Published models put a space before every text that they encode, and cannot tell U+2581 from a space. Models
    without that space, such as the ones trained here, encode U+2581 as its bytes, so that every text decodes to itself.
    """

    def __init__(self, path: pathlib.Path):
        self.files = (path,)
        data = read_small(path)
        self._format = spm_format.ModelProto()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._format.ParseFromString(data)
        except Exception as error:  # RuntimeError and protobuf's DecodeError
            raise ValueError(f"{path} is not a SentencePiece model") from error
        text, trainer = self._format.normalizer_spec, self._format.trainer_spec
        types = {piece.type for piece in self._format.pieces}
        if trainer.model_type != trainer.BPE or text.precompiled_charsmap or text.remove_extra_whitespaces:
            raise ValueError(f"{path} must be a BPE model without text normalisation, as Llama's and Vicuna's are")
        if max(len(piece.piece) for piece in self._format.pieces) > MAX_TOKEN:
            raise ValueError(f"{path} has a piece of more than {MAX_TOKEN} characters")
        if types - {_NORMAL, _CONTROL, _UNKNOWN, _BYTE} or not trainer.byte_fallback:
            raise ValueError(
                f"{path} has user-defined pieces or no byte fallback for unknown characters, unlike Llama's"
            )
        self.config = read_settings(path.parent / CONFIG)
        self._prefix = text.add_dummy_prefix
        self._scheme = prefix_scheme(self.config) or "always"  # where the space is put, if there is one
        self.prefix_once = self._prefix and self._scheme == "first"
        self._behind = self._model if self._scheme == "always" else _without_prefix(self._format)
        if self._scheme == "never":
            self._model = self._behind
        self.vocab_size = self._model.vocab_size()
        pieces = enumerate(self._format.pieces)
        self._special = {piece.piece: i for i, piece in pieces if piece.type in (_CONTROL, _UNKNOWN)}
        bos = self._model.bos_id() if self.config.get("add_bos_token") is not False else -1
        self.bos = bos if bos >= 0 else None
        ends = [END] * (END in self._special) + [self._model.id_to_piece(i) for i in [self._model.eos_id()] if i >= 0]
        if not ends:
            raise ValueError(f"{path} has no special token that ends a turn: it needs {END} or an eos piece")
        self.end = ends[0]
        self.pad = PAD if PAD in self._special else self._model.id_to_piece(self._model.unk_id())
        self.image = IMAGE if IMAGE in self._special else self.pad
        self.image_id = self._special[self.image]

    def __reduce__(self):  # the parsed model cannot be pickled for another process
        return SentencePieceTokenizer, self.files

    def encode(self, text: str) -> list[int]:
        text.encode()  # raises ValueError for half a surrogate pair, which JSON can hold
        return self.encode_with_offsets(text)[0] if SPACE in text else self._model.encode(text)

    def encode_with_offsets(self, text: str, behind_special: bool = False) -> tuple[list[int], Offsets]:
        model = self._behind if behind_special and self.prefix_once else self._model
        ids, spans, at = [], [], 0
        for part in [text] if self._prefix else re.split(f"({SPACE})", text):
            if part == SPACE and not self._prefix:
                ids += [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in part.encode()]
                spans += [(at, at + 1)] * 3
            elif part:
                # SentencePiece's offsets count UTF-8 bytes; to_char[b] is the index of byte b's character.
                char_bytes = [len(char.encode()) for char in part] if not part.isascii() else [1] * len(part)
                to_char = np.append(np.repeat(np.arange(len(part)), char_bytes), len(part)) + at
                for piece in model.encode(part, return_type="proto").pieces:
                    ids.append(piece.id)
                    spans.append((int(to_char[piece.begin]), int(to_char[piece.end])))
            at += len(part)
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self._special.values())
        # The language model's vocabulary may be padded beyond the tokenizer's.
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in special])

    def special_id(self, name: str) -> int:
        if name not in self._special:
            raise ValueError(no_special(self.files[0], name))
        return self._special[name]

    def with_image(self, rows: int) -> "SentencePieceTokenizer | JsonTokenizer":
        if self.image == IMAGE and self.image_id < rows:
            return self
        return with_image(self.library(), self, rows, self.config)

    def save(self, folder: str | os.PathLike) -> None:
        folder = pathlib.Path(folder)
        for file in self.files:
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(file, folder / "tokenizer.model")
        write_tokenizer(self.library(), self, folder, self.config, False)

    def library(self) -> tokenizers.Tokenizer:
        pieces = list(enumerate(self._format.pieces))
        return piece_tokenizer(
            {piece.piece: (i, piece.score) for i, piece in pieces if piece.type == _NORMAL},
            {piece.piece: i for i, piece in pieces if piece.type != _NORMAL},
            list(self._special),
            self._model.id_to_piece(self._model.unk_id()),
            None if self.bos is None else self._model.id_to_piece(self.bos),
            self._scheme if self._prefix else None,
        )


def piece_tokenizer(
    normal: Mapping[str, tuple[int, float]],
    others: Mapping[str, int],
    special: Sequence[str],
    unknown: str,
    bos: str | None,
    scheme: str | None,
) -> tokenizers.Tokenizer:
    """Makes a tokenizer of the library `tokenizers`, whose list of merges replaces SentencePiece's scores.

    Args:
      normal: id and score of each piece of text, which spells a space as U+2581.
      others: ids of the bytes, the unknown token and the control symbols.
      special: names in `others` that are no text, in the order of their ids.
      unknown: name in `others` of the unknown token.
      bos: name in `others` of the token that starts every sequence; None if there is none.
      scheme: where a space is put before texts, see `prefix_scheme`; None puts none and tells U+2581 from a space.
    """
    # Without the space in front, a space is spelled as itself, so U+2581 is unknown and becomes bytes.
    space = " " if scheme is None else SPACE
    normal = {text.replace(SPACE, space): found for text, found in normal.items()}
    # SentencePiece merges the pair whose piece has the best score; the lower id breaks ties.
    merges = [
        (-score, i, text[:cut], text[cut:])
        for text, (i, score) in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    merges.sort(key=lambda merge: merge[:2])
    bpe = models.BPE(
        {**{text: i for text, (i, _) in normal.items()}, **others},
        [(left, right) for _, _, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    model = tokenizers.Tokenizer(bpe)
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if scheme is not None:
        if scheme == "always":
            model.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        else:
            model.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        steps = [decoders.Replace(SPACE, " "), *steps, *[decoders.Strip(" ", 1, 0)] * (scheme != "never")]
    model.decoder = decoders.Sequence(steps)
    if bos is not None:
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, others[bos])]
        )
    model.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in special])
    return model


def _without_prefix(model: spm_format.ModelProto) -> sentencepiece.SentencePieceProcessor:
    """Returns the same model without the space that it puts before a text."""
    other = spm_format.ModelProto()
    other.CopyFrom(model)
    other.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=other.SerializeToString())
