"""Refuses a tokenizer.json that could keep the library `tokenizers` busy for ever, or make a text of any size.

Its regular expressions search by backtracking: `(a+)+$` takes twice as long for each further letter. Its replacements
may write more than they read, one after the other: forty that double a letter make a terabyte of it.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import tokenizers

from fastvlm_jax.files import POINTER, pointer_message, read_small
from fastvlm_jax.text.tokenizer_config import QWEN2_WORDS

# The regular expressions of published tokenizers; each needs time in proportion to the text, long runs of spaces apart.
REGEXES = frozenset((
    QWEN2_WORDS,
    QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),  # Llama 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
    r"\p{N}{1,3}", r"\p{N}", r"\s+", r" {2,}",  # parts of others
))  # fmt: skip
MAX_IDS = 1 << 22  # ids of a vocabulary: the library makes a table as long as the largest, 4 GB for an id of 10^9
MAX_STEPS = 64  # normalizers, or decoders, in a tokenizer
MAX_PREFIX = 16  # characters that a normalizer puts before a text
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json.

    Raises:
      ValueError: it is damaged, too large, or asks for what this module refuses; the message names it.
    """
    data = read_small(path)
    if data.startswith(POINTER):
        raise ValueError(pointer_message(path))
    try:
        content = json.loads(data)
        if isinstance(content, dict):
            _check_ids(content)
            for part in PARTS:
                _check(content.get(part))
        return tokenizers.Tokenizer.from_buffer(data)
    except RecursionError as error:
        raise ValueError(f"{path} is not a tokenizer.json: it nests too deep") from error
    except BaseException as error:  # the library raises a bare Exception, and panics
        raise refusal(error, f"{path} is not a tokenizer.json") from error


def refusal(error: BaseException, what: str) -> BaseException:
    """Returns the ValueError, of one line, for an error of the library; other errors, such as Ctrl-C, as they are."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return ValueError(f"{what}: {' '.join(str(error).split())[:300]}")


def _check_ids(content: dict[str, Any]) -> None:
    """Raises ValueError if a token has an id of MAX_IDS or more."""
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if wrong := [at for at in ids if isinstance(at, int | float) and at >= MAX_IDS]:
        raise ValueError(f"a token has the id {wrong[0]}, more than any vocabulary has")


def _check(part: Any) -> None:
    """Raises ValueError if a part of a tokenizer may take too much time or memory."""
    steps = list(_objects(part))
    if len(steps) > MAX_STEPS * 4:  # a step holds objects of its own, such as its pattern
        raise ValueError(f"it has more than {MAX_STEPS} steps")
    for step in steps:
        pattern, kind = step.get("pattern"), step.get("type")
        pattern = pattern if isinstance(pattern, dict) else {}
        regex = pattern.get("Regex")
        if regex is not None and regex not in REGEXES:
            raise ValueError(
                f"the regular expression {str(regex)[:80]!r} is not that of a published tokenizer, and might take for "
                "ever: add it to REGEXES in fastvlm_jax/text/tokenizer_json.py if you know it"
            )
        content, found = step.get("content"), 1 if regex is not None else len(str(pattern.get("String", "")))
        if kind == "Replace" and isinstance(content, str) and len(content) > found:
            raise ValueError(f"it replaces {found} characters by {len(content)}: texts might grow without end")
        if kind == "Prepend" and len(str(step.get("prepend"))) > MAX_PREFIX:
            raise ValueError(f"it puts more than {MAX_PREFIX} characters before a text")
        if kind == "Precompiled":
            raise ValueError("it holds compiled replacements (precompiled_charsmap), which are not read")


def _objects(value: Any) -> Iterator[dict]:
    """Yields all objects in a JSON value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)
