"""Model directories on disk: weights read lazily from safetensors, folders written whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastvlm_jax.convert.mapping import Tensor

LAYOUTS = {"fastvlm_jax": "native", "fast_vlm": "hf"}  # by `format` or `model_type` in config.json
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def recognise(path: str | os.PathLike) -> str:
    """The layout of a model directory: "native" (ours) or "hf" (transformers), told by its config.json.

    Raises:
      FileNotFoundError: no such folder, no config.json, no weights.
      ValueError: a file, a pickle, an unreadable config.json, or one of another kind of model.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(_pickle_message(path))
        raise ValueError(f"{path} is a file: give the model directory that it lies in")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: give a model directory")
    config = read_json(path / "config.json")
    kind = config.get("format", config.get("model_type"))
    if kind not in LAYOUTS:
        known = " or ".join(repr(name) for name in LAYOUTS)
        raise ValueError(f"{path / 'config.json'} describes {kind!r}: only {known} models can be read")
    _check_weights(path)
    return LAYOUTS[kind]


def read_json(path: pathlib.Path) -> dict:
    """The JSON object in `path`.

    Raises:
      FileNotFoundError, ValueError: no such file; not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a model directory, ours or one of transformers")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): copy or export the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: copy or export the model again")
    return content


def write_json(path: pathlib.Path, content: Mapping) -> None:
    """Writes `content` with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _check_weights(folder: pathlib.Path) -> None:
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
        raise ValueError(_pickle_message(pickles[0]))
    raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}: the folder is incomplete, copy it again")


def _pickle_message(file: pathlib.Path) -> str:
    return (
        f"{file} is a pickle, which can run any code when it is loaded: convert it to safetensors first, with "
        "`save_pretrained(folder)` in transformers or safetensors.torch.save_file"
    )


def open_weights(folder: pathlib.Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names; each is read when it is indexed.

    Raises:
      FileNotFoundError, ValueError: no weights, a pickle, a missing shard, a truncated or lying file.
    """
    _check_weights(folder)
    if (folder / WEIGHTS).is_file():
        return _open(folder / WEIGHTS)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map: copy it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f"{folder / INDEX} names the shard {shard!r}, which is not a file name: copy it again")
        tensors |= _open(folder / shard)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{folder / weight_map[missing[0]]} lacks tensor {missing[0]} of {INDEX}: copy it again")
    return tensors


def _open(file: pathlib.Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {INDEX} names it, copy the model directory again")
    try:
        opened = safe_open(file, framework="numpy")
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): copy or export it again") from error


def save_weights(file: pathlib.Path, tensors: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """Writes safetensors; floating tensors in `dtype` ("float32" | "bfloat16" | "float16").

    Raises:
      ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    # safetensors writes the memory behind an array as it lies: views must be copied first (order="C").
    stored = {
        name: np.array(x, np.int64 if x.dtype == np.int64 else DTYPES[dtype], order="C", copy=None)
        for name, x in tensors.items()
    }
    file.touch()
    mode = file.stat().st_mode  # safetensors would leave the file to its owner alone
    save_file(stored, file, metadata={"format": "pt"})
    file.chmod(mode)


@contextlib.contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields an empty folder beside `target` that takes its place when the block ends well, and is removed otherwise.

    Raises:
      ValueError: `target` is a file or a folder with something in it; with `overwrite`, something other than a model.
    """
    target = pathlib.Path(target).expanduser().resolve()
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    if old.is_dir() and not target.exists():  # killed between the two renames below
        old.rename(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} is not empty: name another folder, or --overwrite the model in it")
        try:
            recognise(target)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{target} holds other things than a model: name another folder") from error
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
