"""Tells the layout of a model by its files."""

import os
import pathlib

from fastvlm_jax.convert.weight_files import CONFIG, OPEN_CLIP_CONFIG, PICKLES, check_weights, pickle_message, read_json

# What config.json calls itself (`format`, or else `model_type`), and the layout that it is of.
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
STEMS = {"openclip": "open_clip_model"}  # of the weight files; "model" elsewhere


def recognise(path: str | os.PathLike) -> str:
    """The layout of a model: a key of convert.READERS.

    "native" is ours, "fastvlm", "decoder" and "vit" are transformers', "llava" is ml-fastvlm's.

    Raises:
      FileNotFoundError: no such folder, no config.json, no weights.
      ValueError: a file that is no model, a pickle, an unreadable config.json, or one of another kind of model.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        if path.suffix in PICKLES:
            raise ValueError(pickle_message(path))
        raise ValueError(f"{path} is a file: give the model directory that it lies in")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: give a model directory")
    if (path / OPEN_CLIP_CONFIG).is_file():
        layout = "openclip"
    elif not (path / CONFIG).is_file() and len(list(path.glob("*.gguf"))) == 1:
        return "gguf"
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
    """The file of a model that `recognise` called "gguf": the path itself, or the one GGUF file in that folder."""
    path = pathlib.Path(path).expanduser()
    return path if path.is_file() else next(path.glob("*.gguf"))
