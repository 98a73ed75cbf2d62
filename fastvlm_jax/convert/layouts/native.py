"""Reads and writes the package's own model directory: weights by '/'-joined paths, sizes and lineage in config.json.

convert.write adds the processor's files.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.convert.mapping import COUNTERS, Row, described, shapes_of, to_jax, to_torch
from fastvlm_jax.convert.weight_files import CONFIG, open_weights, read_json, save_weights, write_json
from fastvlm_jax.models import kinds

FORMAT = "fastvlm_jax"


def write(
    folder: pathlib.Path,
    variables: dict,
    model_config: Mapping[str, Any],
    lineage: Mapping[str, Any],
    dtype: str | None = None,
) -> None:
    """Writes weights and `config.json` into `folder`; counters are left out.

    Args:
      folder: an existing folder.
      variables: variables of `kinds.build(**model_config)`, branched or folded.
      model_config: {"vision": ..., "llm": ..., "dtype": ...}, or that of a CLIP; an absent part is None or left out.
      lineage: JSON values that say where the weights come from.
      dtype: dtype of the stored weights; None keeps each tensor's own.

    Raises:
      ValueError: the variables belong to another model.
    """
    shapes = shapes_of(kinds.build(**model_config))
    sizes = {key: dict(value) if isinstance(value, Mapping) else value for key, value in dict(model_config).items()}
    kept = {name: tree for name, tree in variables.items() if name != COUNTERS}
    save_weights(folder, to_torch(_rows(shapes), kept, shapes), dtype)
    write_json(folder / CONFIG, {"format": FORMAT, "model": sizes, "lineage": dict(lineage)})


def read(source: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """Reads a directory that `write` wrote: (model_config, variables as Leaves).

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file, key or tensor is missing, unknown or damaged; the message names it.
    """
    source = pathlib.Path(source).expanduser()
    model_config = without_choices(_config(source, "model"))
    tensors = open_weights(source)
    _, shapes = described(model_config, source / CONFIG)
    return model_config, to_jax(_rows(shapes), tensors, shapes, source)


def without_choices(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a model's config without `remat` and `kernels`: every run chooses for itself how it computes."""
    chosen = ("remat", "kernels")
    return {
        part: {key: value for key, value in args.items() if key not in chosen} if isinstance(args, dict) else args
        for part, args in config.items()
    }


def read_lineage(source: str | os.PathLike) -> dict[str, Any]:
    """Reads the lineage that was given to `write`."""
    return _config(pathlib.Path(source).expanduser(), "lineage")


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> list[Row]:
    return [Row(path, path) for path in shapes]


def _config(source: pathlib.Path, key: str) -> dict[str, Any]:
    """Reads the object under `key` in config.json."""
    file = source / CONFIG
    value = read_json(file).get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key} is missing or not an object: save the model again")
    return value
