"""Our own model directory: weights by their '/'-joined paths, sizes and lineage in config.json, the processor."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fastvlm_jax.convert.files import new_folder, open_weights, read_json, save_weights, write_json
from fastvlm_jax.convert.mapping import Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.data.processor import Processor
from fastvlm_jax.models import fastvlm

FORMAT = "fastvlm_jax"


def save_native(
    variables: dict,
    model_config: Mapping[str, Any],
    processor: Processor,
    target: str | os.PathLike,
    lineage: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes `model.safetensors` (float32), `config.json` and the processor's files.

    Args:
      variables: of `fastvlm.build(**model_config)`, in whatever form the config says.
      model_config: {"vision": ..., "llm": ..., "dtype": ...}.
      processor: writes its own files.
      target: a folder that does not exist or is empty; with `overwrite`, a model directory to replace.
      lineage: JSON values: where these weights come from.

    Raises:
      ValueError: variables of another model, an occupied target.
    """
    shapes = shapes_of(fastvlm.build(**model_config))
    sizes = {key: dict(value) if key in ("vision", "llm") else value for key, value in dict(model_config).items()}
    with new_folder(target, overwrite) as folder:
        save_weights(folder / "model.safetensors", to_torch(_rows(shapes), nn.unbox(variables), shapes))
        write_json(folder / "config.json", {"format": FORMAT, "model": sizes, "lineage": dict(lineage)})
        processor.save(folder)


def load_native(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads what `save_native` wrote: (model_config, variables of float32 numpy arrays).

    Raises:
      FileNotFoundError, ValueError: naming the file, key or tensor that is missing, unknown or damaged.
    """
    source = pathlib.Path(source).expanduser()
    model_config = _config(source, "model")
    tensors = open_weights(source)
    _, shapes = described(model_config, source / "config.json")
    return model_config, to_jax(_rows(shapes), tensors, shapes, source)


def read_lineage(source: str | os.PathLike) -> dict[str, Any]:
    """The lineage that `save_native` was given."""
    return _config(pathlib.Path(source).expanduser(), "lineage")


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> list[Row]:
    return [Row(path, path) for path in shapes]


def _config(source: pathlib.Path, key: str) -> dict[str, Any]:
    file = source / "config.json"
    value = read_json(file).get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key} is missing or not an object: save the model again")
    return value
