"""Reads and writes tokenizer_config.json: the settings of transformers that decide which ids a text gets."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from absl import logging
from tokenizers import normalizers, pre_tokenizers

from fastvlm_jax.files import read_object

CONFIG = "tokenizer_config.json"
SPACE = "▁"  # SentencePiece's spelling of a space
# How Qwen2 splits words: contractions, letters after at most one other character, single digits, punctuation,
# newlines, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NOT_COMPUTED = ("add_eos_token", "do_lower_case", "clean_up_tokenization_spaces")  # they change ids or answers if true


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Reads the object in a JSON file; returns an empty one if there is no such file."""
    return read_object(path) if path.is_file() else {}


def warn_not_computed(folder: pathlib.Path) -> None:
    """Names, in a warning, the settings of a folder's tokenizer_config.json that this package does not compute."""
    config = read_settings(folder / CONFIG)
    if found := [key for key in NOT_COMPUTED if config.get(key) is True]:
        logging.warning("%s: not computed here, so ids or answers may differ: %s", folder / CONFIG, ", ".join(found))


def content_of(token: Any) -> str | None:
    """Returns the text of a token as transformers writes it, a string or an object with `content`; else None."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def class_of(config: Mapping[str, Any]) -> str:
    """Returns transformers' class of tokenizers, without "Fast"; "" if the config names none."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def changes(config: Mapping[str, Any]) -> str:
    """Returns the settings that change the ids of a tokenizer's other files, as JSON; "" if there are none."""
    defaults = {
        "LlamaTokenizer": {"legacy": True, "add_prefix_space": True, "add_bos_token": True},
        "Qwen2Tokenizer": {"add_prefix_space": False},
        "GPT2Tokenizer": {"add_prefix_space": False},
    }.get(class_of(config), {})
    found = {key: config[key] for key, value in defaults.items() if config.get(key) not in (None, value)}
    return json.dumps(found) if found else ""


def prefix_scheme(config: Mapping[str, Any]) -> str | None:
    """Returns where a Llama tokenizer puts a space before a text; None if the config leaves that open.

    "always" is before every text between special tokens, "first" before the first text alone (`legacy: false`), and
    "never" nowhere (`add_prefix_space: false`).
    """
    if class_of(config) != "LlamaTokenizer":
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return {True: "always", False: "first"}.get(config.get("legacy"))


def obey(model: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Changes `model`, as its tokenizer.json holds it, to what the classes of transformers make of it by `config`."""
    scheme, prefix = prefix_scheme(config), config.get("add_prefix_space")
    if scheme is not None:
        model.normalizer = None
        model.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    elif class_of(config) in ("Qwen2Tokenizer", "GPT2Tokenizer") and isinstance(prefix, bool) and model.pre_tokenizer:
        state = json.loads(model.pre_tokenizer.__getstate__())
        for part in state.get("pretokenizers", [state]):
            if part["type"] == "ByteLevel":
                part["add_prefix_space"] = prefix
        changed = model.pre_tokenizer
        changed.__setstate__(json.dumps(state).encode())
        model.pre_tokenizer = changed


def puts_space_once(model: tokenizers.Tokenizer) -> bool:
    """Returns whether `model` puts a space before the first text and before none behind a special token."""
    first = model.pre_tokenizer
    return isinstance(first, pre_tokenizers.Metaspace) and first.prepend_scheme == "first"


def without_prefix(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """Returns the tokenizer for text behind a special token, if no space is put there as before the first text."""
    if not puts_space_once(model):
        return None
    other = tokenizers.Tokenizer.from_str(model.to_str())
    other.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    return other


def write_tokenizer(
    model: tokenizers.Tokenizer, names: Any, folder: pathlib.Path, stored: Mapping[str, Any], changed: bool
) -> None:
    """Writes the files from which transformers' AutoTokenizer loads `model`.

    These are tokenizer.json and tokenizer_config.json; for Qwen2 also vocab.json and merges.txt, which transformers 4
    reads when the slow tokenizer is requested.

    Args:
      model: tokenizer to write.
      names: object with the attributes `bos`, `end`, `pad` and `image` of a `Tokenizer`.
      folder: existing folder to write into.
      stored: contents of the tokenizer_config.json that the tokenizer was read with; written back as they are.
      changed: whether the tokens are no longer those of `stored`, of which then only other settings are kept.
    """
    is_qwen2 = _is_qwen2(model)
    model.save(str(folder / "tokenizer.json"))
    if is_qwen2:
        model.model.save(str(folder))
    added = model.get_added_tokens_decoder()
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    # Other classes rebuild the tokenizer by their own rules instead of reading tokenizer.json.
    rebuilt = {
        "Qwen2Tokenizer": is_qwen2,
        "LlamaTokenizer": prefix_scheme(stored) is not None or puts_space_once(model),
    }
    kept = rebuilt.get(class_of(stored), class_of(stored) in ("PreTrainedTokenizer", "TokenizersBackend"))
    kind = stored["tokenizer_class"] if kept else "Qwen2Tokenizer" if is_qwen2 else "PreTrainedTokenizerFast"
    config = {
        "tokenizer_class": kind,
        "added_tokens_decoder": {str(i): {flag: getattr(added[i], flag) for flag in flags} for i in sorted(added)},
        "add_bos_token": names.bos is not None,
        "bos_token": None if names.bos is None else model.id_to_token(names.bos),
        "eos_token": names.end,
        "pad_token": names.pad,
        "unk_token": names.pad,
        "extra_special_tokens": {"image_token": names.image},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    if stored and not changed:
        config = {**stored, "tokenizer_class": kind}
    elif stored:
        limit = {key: stored[key] for key in ("model_max_length",) if key in stored}
        config = {**stored, **config, **limit}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _is_qwen2(model: tokenizers.Tokenizer) -> bool:
    """Returns whether transformers' Qwen2Tokenizer, whose word splitting and NFC form are fixed, equals `model`."""
    words, form = json.loads(model.pre_tokenizer.__getstate__()) if model.pre_tokenizer else {}, model.normalizer
    patterns = [part.get("pattern") for part in words.get("pretokenizers", ())]
    return {"Regex": QWEN2_WORDS} in patterns and isinstance(form, normalizers.NFC)
