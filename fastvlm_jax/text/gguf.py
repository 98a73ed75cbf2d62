"""Reads and writes the tokenizer inside a GGUF file, llama.cpp's file format.

tokenizer.ggml.model   tokenizer.ggml.pre       what it is
gpt2                   qwen2, smollm, gpt-2     byte-level BPE: tokens and merges
llama                  default                  SentencePiece: pieces and scores
"""

import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from fastvlm_jax.gguf_file import read_contents, short
from fastvlm_jax.text.bpe import MAX_SQUARES, MAX_TOKEN, JsonTokenizer, bpe_tokenizer
from fastvlm_jax.text.image_token import IMAGE
from fastvlm_jax.text.spm import piece_tokenizer
from fastvlm_jax.text.tokenizer_config import SPACE
from fastvlm_jax.text.tokenizer_json import refusal
from fastvlm_jax.text.words import kind_of

# Token types: text, the unknown token, special, added but allowed in text, filler, a byte.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
WORDS = {"qwen2": "qwen2", "smollm": "smollm", "gpt-2": "gpt2"}  # `tokenizer.ggml.pre` -> kind of bpe_tokenizer
PREFIX = "tokenizer.ggml."
LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # special ids of a SentencePiece model that a file does not give


def read_gguf_tokenizer(file: str | os.PathLike) -> JsonTokenizer:
    """Reads the tokenizer inside a GGUF file, byte-level BPE or SentencePiece.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or a key is missing, damaged or describes another kind of tokenizer; the message
        names the file and the key.
    """
    file = pathlib.Path(file).expanduser()
    metadata = read_contents(file).metadata

    def table(key: str, kind: type) -> Any:
        value = metadata.get(PREFIX + key)
        if not isinstance(value, kind) or (kind is not str and not len(value)):
            raise ValueError(f"{file}: {PREFIX}{key} is {short(value)}: no tokenizer can be read")
        return value

    model = table("model", str)
    pieces = model == "llama"
    words = "default" if pieces else table("pre", str)
    if not pieces and (model != "gpt2" or words not in WORDS):
        raise ValueError(
            f"{file}: its tokenizer is of the kind {model!r}, {words!r}; only 'llama', and 'gpt2' with "
            f"{' or '.join(WORDS)}, can be read: put the model's own tokenizer.json or tokenizer.model beside the file"
        )
    tokens, types = table("tokens", list), table("token_type", np.ndarray)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{file}: {PREFIX}tokens and {PREFIX}token_type differ in length, or a token occurs twice")
    config: dict[str, Any] = {"add_bos_token": metadata.get(f"{PREFIX}add_bos_token", pieces) is True}
    for name in ("bos", "eos"):
        at = metadata.get(f"{PREFIX}{name}_token_id", LLAMA_IDS[name] if pieces else None)
        if type(at) is int and 0 <= at < len(tokens):
            config[f"{name}_token"] = tokens[at]
    if pieces:
        prefix = metadata.get(f"{PREFIX}add_space_prefix", True) is not False
        return _of_pieces(file, tokens, types, table("scores", np.ndarray), prefix, config)
    pairs = [tuple(merge.split(" ")) for merge in table("merges", list)]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{file}: {PREFIX}merges has {short(' '.join(wrong[0]))}, which is not a pair")
    added = {tokens[i]: i for i in map(int, np.flatnonzero((types == CONTROL) | (types == USER_DEFINED)))}
    words_end = max((i for i in range(len(tokens)) if tokens[i] not in added and types[i] != UNUSED), default=-1)
    vocab = {token: i for i, token in enumerate(tokens[: words_end + 1])}
    plain = {token for token, i in added.items() if types[i] == USER_DEFINED}
    return bpe_tokenizer(vocab, pairs, added, WORDS[words], file, plain=plain, config=config)


def _of_pieces(
    file: pathlib.Path,
    tokens: Sequence[str],
    types: np.ndarray,
    scores: np.ndarray,
    prefix: bool,
    config: Mapping[str, Any],
) -> JsonTokenizer:
    """Makes the tokenizer of a SentencePiece model; `prefix` says whether a space is put before texts."""
    if len(scores) != len(tokens):
        raise ValueError(f"{file}: {PREFIX}scores and {PREFIX}tokens differ in length")
    if max(map(len, tokens)) > MAX_TOKEN or sum(len(token) ** 2 for token in tokens) > MAX_SQUARES:
        raise ValueError(f"{file}: {PREFIX}tokens has one of more than {MAX_TOKEN} characters, or too many long ones")

    def of(*kinds: int) -> dict[str, int]:
        return {tokens[i]: i for i in map(int, np.flatnonzero(np.isin(types, kinds)))}

    unknown = [*of(UNKNOWN)]
    if len(unknown) != 1 or len(of(BYTE)) != 256:
        raise ValueError(f"{file}: {PREFIX}token_type marks not one unknown token and 256 bytes, as Llama's does")
    special = of(CONTROL, UNKNOWN)
    bos = config.get("bos_token") if config["add_bos_token"] and config.get("bos_token") in special else None
    normal = {token: (i, float(scores[i])) for token, i in of(NORMAL).items()}
    scheme = "always" if prefix else None
    try:
        model = piece_tokenizer(normal, special | of(USER_DEFINED, BYTE), list(special), unknown[0], bos, scheme)
        model.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in of(USER_DEFINED)])
        return JsonTokenizer(model, file, {**config, "unk_token": unknown[0]})
    except ValueError:
        raise
    except BaseException as error:  # the library raises a bare Exception, and panics
        raise refusal(error, f"{file}: {PREFIX}tokens do not fit") from error


def gguf_tokenizer(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Returns the metadata by which llama.cpp and `read_gguf_tokenizer` make a tokenizer again.

    Ids that the tokenizer lacks become filler tokens. An `<image>` behind the model's rows is left out.

    Args:
      tokenizer: a `Tokenizer`, see text/tokenizer.py.
      rows: number of rows of the model's embedding.

    Raises:
      ValueError: GGUF has no name for this kind of tokenizer, or it has more ids than the model; the message names its
        file.
    """
    file, model = tokenizer.files[0], tokenizer.library()
    names = {i: token for token, i in model.get_vocab().items() if token != IMAGE or i < rows}
    if max(names) >= rows:
        raise ValueError(f"{file} has the id {max(names)} and the model {rows} ids: give the model's own tokenizer")
    bpe = json.loads(model.to_str())["model"]
    types = [NORMAL if i in names else UNUSED for i in range(rows)]
    for i, token in model.get_added_tokens_decoder().items():
        if i in names:
            types[i] = CONTROL if token.special else USER_DEFINED
    tables: dict[str, Any] = {"add_bos_token": tokenizer.bos is not None, "add_eos_token": False}
    merges = [tuple(pair) for pair in bpe.get("merges", ())]
    if bpe.get("byte_fallback"):
        prefix, space = _space(model)
        ids = {token: i for i, token in names.items()}
        unknown, in_bytes = ids.get(bpe.get("unk_token")), [ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        if None in (unknown, *in_bytes):
            raise ValueError(f"{file} lacks an unknown token or one of the 256 bytes, which GGUF asks for")
        for i in in_bytes:
            types[i] = BYTE
        types[unknown] = UNKNOWN
        scores = _scores(merges, {token for i, token in names.items() if types[i] == NORMAL}, file)
        tables |= {"model": "llama", "pre": "default", "add_space_prefix": prefix, "unknown_token_id": unknown}
        tables["scores"] = [scores.get(names.get(i), float(-len(merges))) for i in range(rows)]
        names = {i: token.replace(space, SPACE) if types[i] == NORMAL else token for i, token in names.items()}
    else:
        kind = kind_of(model)
        if bpe.get("type") != "BPE" or bpe.get("ignore_merges") or kind is None:
            raise ValueError(f"{file}: GGUF has no name for how this tokenizer splits words: only {' or '.join(WORDS)}")
        pre = next(name for name, known in WORDS.items() if known == kind)
        tables |= {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in merges]}
    tables |= {"tokens": [names.get(i, f"[PAD{i}]") for i in range(rows)], "token_type": types}
    return {PREFIX + key: value for key, value in tables.items()}


def _space(model: tokenizers.Tokenizer) -> tuple[bool, str]:
    """Returns whether a tokenizer with byte fallback puts a space before texts, and how its vocabulary spells one."""
    form, words = ("" if x is None else x.__getstate__().decode() for x in (model.normalizer, model.pre_tokenizer))
    if SPACE not in form + words:
        return False, " "
    return "Prepend" in form or ("Metaspace" in words and '"never"' not in words), SPACE


def _scores(merges: Sequence[tuple[str, str]], pieces: set[str], file: pathlib.Path) -> dict[str, float]:
    """Returns the scores by which SentencePiece merges as a list of merges does: the first piece to be made has 0.

    Raises:
      ValueError: no scores do, as merges of one piece are apart or missing.
    """
    if max(map(len, pieces), default=0) > MAX_TOKEN:
        raise ValueError(f"{file} has a token of more than {MAX_TOKEN} characters")
    made = [piece for piece, _ in itertools.groupby(left + right for left, right in merges)]
    pairs = {(x[:cut], x[cut:]) for x in pieces for cut in range(1, len(x)) if {x[:cut], x[cut:]} <= pieces}
    if len(set(made)) != len(made) or pairs != set(merges):
        raise ValueError(
            f"{file}: its merges are not those of a SentencePiece model, and GGUF holds only scores of one"
        )
    return {piece: float(-rank) for rank, piece in enumerate(made)}
