"""Writes a language model as one GGUF file, llama.cpp's file format, with its tokenizer and chat template.

GGUF's Llama and Qwen2 know no images: encoder and projector of a whole model are left out. Matrices have the type that
was asked for; norms and biases are float32, as llama.cpp wants them.
"""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from absl import logging
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, LlamaFileType

from fastvlm_jax.convert.mapping import Outgoing, shapes_of, to_torch
from fastvlm_jax.convert.tables.gguf import ARCHITECTURES, gguf_rows, permuted_heads
from fastvlm_jax.convert.vocabulary import special_ids
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import TEMPLATES, chat_template
from fastvlm_jax.text.gguf import gguf_tokenizer

# Name of a type -> (type of the matrices, what the file's metadata calls it).
TYPES = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
VALUES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
INFINITE = {Kind.F16: 65520.0, Kind.Q8_0: 127 * 65520.0}  # from here on a value, or a block's scale, is no float16
_ROWS = 1024  # rows of a matrix that are converted at a time


def write(
    folder: pathlib.Path,
    model_config: Mapping[str, Any],
    variables: dict,
    processor: Processor,
    lineage: Mapping[str, Any],
    name: str,
    kind: str = "f16",
) -> None:
    """Writes `model-KIND.gguf` into `folder`, one tensor in memory at a time.

    A matrix whose rows Q8_0 cannot divide into blocks is written as float16; a warning names it.

    Args:
      folder: an existing folder.
      model_config, variables: a language model alone.
      processor: source of tokenizer, chat template and special ids.
      lineage: JSON values that say where the weights come from; stage and parent are written.
      name: name of the model in the file.
      kind: type of the matrices, a key of TYPES.

    Raises:
      ValueError: GGUF cannot hold the tokenizer or a value, or the variables belong to another model.
      OSError: the file cannot be written.
    """
    model = fastvlm.build(llm=model_config["llm"])
    llm = Decoder(**model.llm_args)
    architecture = next(known for known, biased in ARCHITECTURES.items() if biased == llm.qkv_bias)
    matrices, file_type = TYPES[kind]
    tensors = to_torch(gguf_rows(llm), variables, shapes_of(model))
    kinds = {key: _kind(x.shape, matrices) for key, x in tensors.items()}
    if odd := [key for key, found in kinds.items() if found == Kind.F16 != matrices]:
        logging.warning("%s, as 32 does not divide their rows: f16 instead of q8_0", ", ".join(odd))
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_origin(lineage),
        **{f"{architecture}.{key}": value for key, value in _sizes(llm).items()},
        **gguf_tokenizer(processor.tokenizer, llm.vocab_size),
        **{f"tokenizer.ggml.{SPECIAL[key]}": value for key, value in special_ids(processor).items()},
        "tokenizer.chat_template": chat_template(TEMPLATES[processor.template], processor.tokenizer),
    }
    file = folder / f"model-{kind}.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, value, VALUES[type(value)])
    for key, x in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(x.shape, kinds[key])
        writer.add_tensor_info(key, shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[key])
    heads = permuted_heads(llm)
    try:
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key, x in tensors.items():
                writer.write_tensor_data(_encode(key, x, kinds[key], heads.get(key, 0)))
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def _kind(shape: tuple[int, ...], wanted: Kind) -> Kind:
    """Returns the type in which a tensor is stored, if its matrices are to be of type `wanted`."""
    if len(shape) == 1:
        return Kind.F32
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _encode(name: str, tensor: Outgoing, kind: Kind, heads: int) -> np.ndarray:
    """Reads a tensor and returns its bytes, uint8 [..., bytes of a row]; `heads` see `permuted_heads`, 0 if none."""
    x = tensor.read()
    if heads:
        x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2)
    x = x.reshape(-1, tensor.shape[-1])
    out = np.empty(gguf.quant_shape_to_byte_shape(x.shape, kind), np.uint8)
    for start in range(0, len(x), _ROWS):
        part = np.ascontiguousarray(x[start : start + _ROWS], np.float32)
        finite = np.isfinite(part).all()
        if (kind == Kind.Q8_0 and not finite) or (finite and np.abs(part).max() >= INFINITE.get(kind, np.inf)):
            raise ValueError(f"tensor {name} has values that {kind.name.lower()} cannot hold: choose bf16 or f32")
        out[start : start + _ROWS] = gguf.quantize(part, kind).view(np.uint8)
    return out


def _sizes(llm: Decoder) -> dict[str, int | float]:
    """Returns the sizes of a language model under llama.cpp's keys, without the architecture in front."""
    return {
        "vocab_size": llm.vocab_size,
        "context_length": llm.context_length,
        "embedding_length": llm.width,
        "block_count": llm.num_layers,
        "feed_forward_length": llm.mlp_dim,
        "attention.head_count": llm.num_heads,
        "attention.head_count_kv": llm.num_kv_heads,
        "attention.key_length": llm.size_of_head,
        "attention.value_length": llm.size_of_head,
        "attention.layer_norm_rms_epsilon": float(llm.epsilon),
        "rope.dimension_count": llm.size_of_head,
        "rope.freq_base": float(llm.rope_theta),
    }


def _origin(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stage that trained a language model, and the name of the model that it began from, if known."""
    found, at = {}, lineage
    while isinstance(at, Mapping):
        parts = at.get("parts")
        at = parts.get("llm") if isinstance(parts, Mapping) else at
        if isinstance(at, Mapping) and "stage" in at:
            found.setdefault("general.finetune", str(at["stage"]))
            at = at.get("parent")
        elif isinstance(at, Mapping):
            if "path" in at:
                base = {"count": 1, "0.name": pathlib.PurePath(str(at["path"])).name}
                found |= {f"general.base_model.{key}": value for key, value in base.items()}
            break
    return found
