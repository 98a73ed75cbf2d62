"""Reads and writes the config.json of Qwen2 and Llama language models, in the form of transformers and ml-fastvlm.

Configs of transformers 4 and 5 can be read.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.mapping import MAX_LAYERS
from fastvlm_jax.models.decoder import Decoder

# `model_type` -> whether the attention has biases on q, k and v; the llava types are the plain ones with an encoder.
QKV_BIAS = {"qwen2": True, "llama": False, "llava_qwen2": True, "llava_llama": False}
SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
MAX_SIZE = 2**31 - 1  # beyond any real decoder; more is refused before anything of that size is allocated


def text_config(
    llm: Decoder,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Returns the config.json of a plain language model, or the `text_config` of one inside FastVLM.

    `rope_theta` is written twice: transformers 5 reads it from `rope_parameters`, transformers 4 and MLX from the top.

    Raises:
      ValueError: a special id lies outside the vocabulary.
    """
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for name, token in special.items():
        if token is not None and not 0 <= token < llm.vocab_size:
            raise ValueError(f"llm.vocab_size={llm.vocab_size} is too small for the tokenizer: {name} is {token}")
    config = {
        "model_type": "qwen2" if llm.qkv_bias else "llama",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.size_of_head,
        "hidden_act": "silu",
        "rms_norm_eps": llm.epsilon,
        "rope_theta": llm.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},
        "max_position_embeddings": llm.context_length,
        "tie_word_embeddings": llm.tie_embeddings,
        **special,
    }
    return config if llm.qkv_bias else {**config, "attention_bias": False, "mlp_bias": False}


def read_text_config(
    file: str | os.PathLike, config: Mapping[str, Any], whole: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the arguments of Decoder that a config of transformers (4 or 5) or of ml-fastvlm describes.

    Args:
      file: where `config` comes from, for messages.
      config: the object with the language model's keys.
      whole: the config.json that contains `config` as `text_config`; None if `config` is the whole file.

    Raises:
      ValueError: a key is missing or has a value that this package does not compute; the message names it.
    """
    prefix = "" if whole is None or whole is config else "text_config."
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in QKV_BIAS:
        raise ValueError(f"{file}: {prefix}model_type is {kind!r}, this package computes {' or '.join(QKV_BIAS)} only")
    expect(file, prefix, config, hidden_act=("silu",), use_sliding_window=(False, None))
    expect(file, prefix, config, attention_bias=(False, None), mlp_bias=(False, None))
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise ValueError(f"{file}: {prefix}layer_types asks for other layers than 'full_attention'")
    # transformers omits keys that have the default of their class, and prefers rope_scaling.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{file}: {prefix}rope_parameters is {rope!r}, it must be an object")
    expect(file, f"{prefix}rope_parameters.", rope, rope_type=("default",), type=("default",))
    expect(file, f"{prefix}rope_parameters.", rope, partial_rotary_factor=(1.0, 1, None))
    llm = {ours: _size(file, prefix, config, theirs) for ours, theirs in SIZES.items()}
    if llm["num_layers"] > MAX_LAYERS:
        raise ValueError(f"{file}: {prefix}num_hidden_layers is {llm['num_layers']}, more than {MAX_LAYERS}")
    llm["num_kv_heads"] = _size(file, prefix, config, "num_key_value_heads", llm["num_heads"])
    llm["head_dim"] = _size(file, prefix, config, "head_dim", llm["width"] // llm["num_heads"] or None)
    if llm["num_heads"] % llm["num_kv_heads"] or llm["head_dim"] % 2:
        raise ValueError(
            f"{file}: {prefix}num_attention_heads={llm['num_heads']} must be a multiple of num_key_value_heads="
            f"{llm['num_kv_heads']}, and head_dim={llm['head_dim']} even"
        )
    theta = rope if rope.get("rope_theta") is not None else config
    llm["rope_theta"] = _positive(file, prefix, theta, "rope_theta", 10000.0)
    llm["epsilon"] = _positive(file, prefix, config, "rms_norm_eps", 1e-6)
    llm["qkv_bias"] = QKV_BIAS[kind]
    ties = (values.get("tie_word_embeddings") for values in (whole or {}, config))
    llm["tie_embeddings"] = any(tie is True for tie in ties)
    default = 32768 if llm["qkv_bias"] else 2048
    llm["context_length"] = _size(file, prefix, config, "max_position_embeddings", default)
    return llm


def expect(file: str | os.PathLike, prefix: str, config: Mapping[str, Any], **allowed: tuple) -> None:
    """Checks that config keys have values that this package computes.

    Args:
      file: where `config` comes from, for messages.
      prefix: what precedes the keys in messages, such as "text_config.".
      config: the object to check.
      **allowed: allowed values of each key; the first is transformers' default and stands for an absent key.

    Raises:
      ValueError: a key has another value; the message names file, key and value.
    """
    for key, values in allowed.items():
        found = config.get(key, values[0])
        if not any(found is value or (type(found) is type(value) and found == value) for value in values):
            names = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{file}: {prefix}{key} is {found!r}, this package computes {names} only")


def _size(file, prefix: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise ValueError(f"{file}: {prefix}{key} is {value!r}, it must be a whole number from 1 to 2**31 - 1")
    return value


def _positive(file, prefix: str, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {prefix}{key} is {value!r}, it must be a positive number")
    return float(value)
