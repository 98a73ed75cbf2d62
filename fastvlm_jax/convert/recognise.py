"""Recognises the layout of a model by its files."""

import os
import pathlib

from fastvlm_jax.convert.weight_files import (
    CONFIG,
    MOBILECLIP_CONFIG,
    OPEN_CLIP_CONFIG,
    PICKLES,
    check_weights,
    pickle_message,
    read_json,
    refuse_adapter,
)

# `format` in config.json, or `model_type` if it has none -> layout.
KINDS = {
    "fastvlm_jax": "native",
    "fast_vlm": "fastvlm",
    "llava_qwen2": "llava",
    "llava_llama": "llava",
    "qwen2": "decoder",
    "llama": "decoder",
    "clip": "vit",
    "clip_vision_model": "vit",
    "siglip": "vit",
    "siglip_vision_model": "vit",
}
STEMS = {"openclip": "open_clip_model"}  # layout -> stem of its weight files; "model" in all others


def recognise(path: str | os.PathLike) -> str:
    """Returns the layout of a model, a key of convert.READERS.

    "native" is this package's own; "fastvlm", "decoder" and "vit" are transformers'; "llava" is ml-fastvlm's; "timm",
    "openclip", "mobileclip" (ml-mobileclip) and "gguf" are named after theirs.

    Raises:
      FileNotFoundError: the folder, its config.json or its weights do not exist.
      ValueError: the path is a file other than a GGUF file, the weights are a pickle or a LoRA adapter, or config.json
        is unreadable or describes another kind of model.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        if path.suffix in PICKLES:
            raise ValueError(pickle_message(path))
        raise ValueError(f"{path} is a file: give the model directory that contains it")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: give a model directory")
    refuse_adapter(path)
    if (path / OPEN_CLIP_CONFIG).is_file():
        layout = "openclip"
    elif not (path / CONFIG).is_file() and len(list(path.glob("*.gguf"))) == 1:
        return "gguf"
    elif not (path / CONFIG).is_file() and len(list(path.glob(MOBILECLIP_CONFIG))) == 1:
        layout = "mobileclip"
    else:
        config = read_json(path / CONFIG)
        kind = config.get("format", config.get("model_type"))
        if kind is None and isinstance(config.get("architecture"), str):
            layout = "timm"
        elif not isinstance(kind, str) or kind not in KINDS:
            known = ", ".join(repr(name) for name in KINDS)
            raise ValueError(f"{path / CONFIG} describes {kind!r}: only {known} and timm models can be read")
        else:
            layout = KINDS[kind]
    check_weights(path, STEMS.get(layout, "model"))
    return layout


def gguf_file(path: str | os.PathLike) -> pathlib.Path:
    """Returns the file of a model in the layout "gguf": `path` itself, or the one GGUF file in that folder.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder holds none or several.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        what = f"{path} holds {len(found)} GGUF files" if path.is_dir() else f"{path} is missing"
        raise FileNotFoundError(f"{what}: give a .gguf file, or a folder with one")
    return found[0]
