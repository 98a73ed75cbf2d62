"""Reads byte-level BPE tokenizers, and writes them for transformers.

The formats are a Hugging Face `tokenizer.json`, Qwen's tiktoken ranks, and `vocab.json` with `merges.txt`.
"""

import base64
import binascii
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, processors

from fastvlm_jax.files import read_object, read_small
from fastvlm_jax.text.image_token import IMAGE, place_image
from fastvlm_jax.text.tokenizer_config import (
    CONFIG,
    class_of,
    content_of,
    obey,
    read_settings,
    without_prefix,
    write_tokenizer,
)
from fastvlm_jax.text.tokenizer_json import read_tokenizer, refusal
from fastvlm_jax.text.words import KINDS, split_words

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

Offsets = list[tuple[int, int]]

MAX_SHORT, MAX_KEPT = 64, 1024  # longest cached text in characters, number of cached texts
MAX_TOKEN = 1024  # bytes, as splitting a token takes time quadratic in its length; Qwen2's longest has 128
MAX_SQUARES = 1 << 27  # squares of the lengths of all tokens, added up: splitting them takes time in proportion


class JsonTokenizer:
    """Holds a tokenizer of the `tokenizers` library, read from a `tokenizer.json` or made by `bpe_tokenizer`.

    If the special tokens follow the vocabulary, as in Qwen2, a missing `<image>` is added on the next free id, as in
    FastVLM's export. Any other vocabulary keeps its size.
    """

    def __init__(self, model: tokenizers.Tokenizer, source: pathlib.Path, config: Mapping[str, Any] | None = None):
        """Takes ownership of `model` and changes it in place.

        Args:
          model: tokenizer of the library.
          source: file that the tokenizer comes from; error messages name it.
          config: contents of its `tokenizer_config.json`, if there is one.

        Raises:
          ValueError: the tokenizer has no special token that ends a turn.
        """
        self.files = (source,)
        self.config = config or {}
        self.changed = False  # whether `<image>` was added to the tokens that `config` describes
        obey(model, self.config)
        self._model = model
        self._behind = without_prefix(model)
        self._short: dict[tuple[str, bool], tuple[list[int], Offsets]] = {}  # cache: templates repeat short texts
        model.encode_special_tokens = True
        model.no_padding()
        model.no_truncation()
        end_id = model.token_to_id(END) or 0
        if model.token_to_id(IMAGE) is None and end_id >= model.get_vocab_size(with_added_tokens=False):
            model.add_special_tokens([IMAGE])
            self.changed = True
        tokens = model.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in tokens.items() if token.special}
        self.vocab_size = max(model.get_vocab().values(), default=-1) + 1
        if isinstance(model.post_processor, processors.ByteLevel):
            # GPT-2's trimmed offsets leave out the space of " red", so the space would get no loss.
            model.post_processor = processors.ByteLevel(trim_offsets=False)
        config = self.config
        named, added = content_of(config.get("bos_token")), config.get("add_bos_token")
        text = model.encode("a", add_special_tokens=False).ids
        first = model.encode("a", add_special_tokens=True).ids[:1]
        # `add_bos_token` in tokenizer_config.json decides; without it, a token that the post-processor prepends is bos.
        self.bos = first[0] if first != text[:1] and added is not False else None
        if added is True and named in self._special:
            self.bos = self._special[named]
        ends = (END, content_of(config.get("eos_token")), "</s>", PAD)
        self.end = next((name for name in ends if name in self._special), None)
        if self.end is None:
            raise ValueError(
                f"{source} has no special token that ends a turn: it needs {END}, an eos_token, </s> or {PAD}"
            )
        pads = (PAD, content_of(config.get("unk_token")), "<unk>", content_of(config.get("pad_token")), self.end)
        self.pad = next(name for name in pads if name in self._special)
        self.image = IMAGE if IMAGE in self._special else self.pad
        self.image_id = self._special[self.image]

    def encode(self, text: str) -> list[int]:
        return list(self.encode_with_offsets(text)[0])

    def encode_with_offsets(self, text: str, behind_special: bool = False) -> tuple[list[int], Offsets]:
        behind = behind_special and self._behind is not None
        if (text, behind) in self._short:
            return self._short[text, behind]
        text.encode()  # raises ValueError for half a surrogate pair, which JSON can hold
        try:
            encoding = (self._behind if behind else self._model).encode(text, add_special_tokens=False)
        except BaseException as error:  # the library panics where a search takes too many steps
            raise refusal(error, f"{self.files[0]} cannot split a text of {len(text):,} characters") from error
        found = encoding.ids, encoding.offsets
        if len(text) <= MAX_SHORT and len(self._short) < MAX_KEPT:
            self._short[text, behind] = found
        return found

    @property
    def prefix_once(self) -> bool:
        return self._behind is not None

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def special_id(self, name: str) -> int:
        if name not in self._special:
            raise ValueError(no_special(self.files[0], name))
        return self._special[name]

    def with_image(self, rows: int) -> "JsonTokenizer":
        return (
            self if self.image == IMAGE and self.image_id < rows else with_image(self._model, self, rows, self.config)
        )

    def library(self) -> tokenizers.Tokenizer:
        return self._model

    def save(self, folder: str | os.PathLike) -> None:
        write_tokenizer(self._model, self, pathlib.Path(folder), self.config, self.changed)


def bpe_tokenizer(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    special: Mapping[str, int],
    kind: str,
    source: str | os.PathLike,
    *,
    plain: Collection[str] = (),
    config: Mapping[str, Any] | None = None,
) -> JsonTokenizer:
    """Makes a byte-level BPE tokenizer.

    Args:
      vocab: id of each token, spelled in GPT-2's printable characters for bytes; may include the special tokens.
      merges: pairs of tokens in merge order.
      special: id of each added token; the tokens that `vocab` lacks must take the next ids after it, without a gap.
      kind: how text is split into words: "qwen2" (after Unicode NFC normalisation), "smollm" (single digits) or "gpt2".
      source: file that the tables come from; error messages name it.
      plain: names in `special` that ordinary text can produce; only templates place the others.
      config: contents of the `tokenizer_config.json`, if there is one.

    Raises:
      ValueError: the kind is unknown, the tables do not fit together, or no special token ends a turn.
    """
    source = pathlib.Path(source)
    if kind not in KINDS:
        raise ValueError(f"{source}: unknown kind of BPE tokenizer {kind!r}: choose one of {', '.join(KINDS)}")
    free = len(vocab)
    if sorted(vocab.values()) != list(range(free)):
        raise ValueError(f"{source}: the ids of the vocabulary are not 0, 1, 2, ..., each once")
    for name, at in sorted(special.items(), key=lambda item: item[1]):
        wanted = vocab.get(name, free)
        if at != wanted:
            raise ValueError(f"{source}: the special token {name} has id {at}, it must be {wanted}")
        free += name not in vocab
    try:
        model = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    except BaseException as error:  # the library raises a bare Exception, and panics
        raise refusal(error, f"{source}: vocabulary and merges do not fit") from error
    split_words(model, kind)
    model.decoder = decoders.ByteLevel()
    for name in sorted(special, key=special.get):
        model.add_tokens([tokenizers.AddedToken(name, normalized=False, special=name not in plain)])
    return JsonTokenizer(model, source, config)


def read_json(path: pathlib.Path) -> JsonTokenizer:
    """Reads a `tokenizer.json`, and the `tokenizer_config.json` beside it if there is one."""
    model, config = read_tokenizer(path), read_settings(path.parent / CONFIG)
    try:
        return JsonTokenizer(model, path, config)
    except ValueError:
        raise
    except BaseException as error:  # the library panics where its parts do not fit together
        raise refusal(error, f"{path} is not a tokenizer.json") from error


def read_tiktoken(path: pathlib.Path) -> JsonTokenizer:
    """Reads Qwen's `.tiktoken` file, each line of which holds a token's bytes in base64 and its rank.

    Qwen2's three special tokens take the ids after the ranks: 151643 to 151645 in the published file.
    """
    ranks = {}
    for number, line in enumerate(read_small(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path} line {number} is not a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path}: the ranks are not 0, 1, 2, ..., each once, with every single byte among them")
    spelling = byte_spelling()

    if max(map(len, ranks)) > MAX_TOKEN or sum(len(token) ** 2 for token in ranks) > MAX_SQUARES:
        raise ValueError(f"{path} has a token of more than {MAX_TOKEN} bytes, or too many long ones")

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _last_two(token, rank, ranks)
            if parts is None:
                raise ValueError(f"{path}: no two tokens of lower rank make up {token!r}")
            merges.append((spell(parts[0]), spell(parts[1])))
    special = {name: len(ranks) + i for i, name in enumerate((PAD, START, END))}
    return bpe_tokenizer(vocab, merges, special, "qwen2", path)


def read_vocab_and_merges(path: pathlib.Path) -> JsonTokenizer:
    """Reads a `vocab.json` and the `merges.txt` beside it, as Qwen2's unless tokenizer_config.json names GPT-2.

    The special tokens come from `tokenizer_config.json`, else from `added_tokens.json`, else they are Qwen2's own.
    """
    merges_file, added_file = path.with_name("merges.txt"), path.with_name("added_tokens.json")
    if not merges_file.is_file():
        raise FileNotFoundError(f"{path} needs a merges.txt beside it")
    try:
        vocab, merges = read_object(path), _read_merges(merges_file)
        if wrong := [token for token, at in vocab.items() if type(at) is not int or at < 0]:
            raise ValueError(f"the token {wrong[0][:80]!r} has no id")
    except ValueError as error:
        raise ValueError(f"{path} and merges.txt cannot be read: {error}") from error
    config = read_settings(path.parent / CONFIG)
    name = class_of(config) or "Qwen2Tokenizer"
    kind = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt2"}.get(name)
    if kind is None:
        raise ValueError(
            f"{path.with_name(CONFIG)}: a vocab.json of tokenizer_class {name} is not supported: give a tokenizer.json"
        )
    entries = config.get("added_tokens_decoder") or {}
    try:
        special = {content_of(entry): int(at) for at, entry in entries.items()}
        special = special or {str(key): int(at) for key, at in read_settings(added_file).items()}
        plain = [content_of(entry) for entry in entries.values() if not entry.get("special", True)]
        if None in special:
            raise ValueError("one has no content")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.parent}: the added tokens are not names with their ids: {error}") from error
    special = special or {name: len(vocab) + i for i, name in enumerate((PAD, START, END))}
    return bpe_tokenizer(vocab, merges, special, kind, path, plain=plain, config=config)


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """Reads a merges.txt, one pair of tokens a line; its first line may tell a version."""
    try:
        lines = read_small(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if (line := line.removesuffix("\r")) and not line.startswith("#version"):
            pairs.append(tuple(line.split(" ")))
            if len(pairs[-1]) != 2:
                raise ValueError(f"{path} line {number} is not a pair of tokens")
    return pairs


def with_image(model: tokenizers.Tokenizer, names: Any, rows: int, stored: Mapping[str, Any]) -> JsonTokenizer:
    """Returns a tokenizer with `<image>` on an id below `rows`; see image_token.py.

    Args:
      model: tokenizer of the library.
      names: `Tokenizer` whose `bos`, `end`, `pad` and first file the result keeps.
      rows: size of the model's vocabulary.
      stored: contents of the tokenizer_config.json of `model`.
    """
    bos = None if names.bos is None else model.id_to_token(names.bos)
    used = {bos, names.end, "<s>", "</s>", START, END, PAD}
    config = {"add_bos_token": bos is not None, "bos_token": bos, "eos_token": names.end, "pad_token": names.pad}
    placed = JsonTokenizer(place_image(model, rows, used, PAD), names.files[0], {**stored, **config})
    placed.changed = True
    return placed


def no_special(path: pathlib.Path, name: str) -> str:
    """Returns the error message for a special token that the tokenizer in `path` lacks."""
    return f"{path} has no special token {name}: choose a template that the tokenizer was made for"


def _last_two(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts left after all merges of a rank below `rank`; None if more than two are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at, best = -1, rank
        for i in range(len(parts) - 1):
            found = ranks.get(parts[i] + parts[i + 1], rank)
            if found < best:
                at, best = i, found
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_spelling() -> list[str]:
    """Returns GPT-2's printable character for each byte: itself if printable Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
