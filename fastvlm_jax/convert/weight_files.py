"""Reads and writes the files of a model directory: JSON files, and weights in safetensors, which are read lazily."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastvlm_jax.convert.mapping import FLOATS, Outgoing, Tensor
from fastvlm_jax.files import read_object, refuse_pointer

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
MOBILECLIP_CONFIG = "mobileclip_*.json"  # of ml-mobileclip, which has one for each size
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # peft's files of a LoRA adapter
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # suffixes of PyTorch's pickled checkpoints
DTYPES = {"float32": FLOATS["F32"], "bfloat16": FLOATS["BF16"], "float16": FLOATS["F16"]}
MAX_SHARD_BYTES = 4_000_000_000


def read_json(path: pathlib.Path) -> dict:
    """Reads the JSON object in `path`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file holds something else; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a model directory with a config.json")
    return read_object(path)


def write_json(path: pathlib.Path, content: Mapping) -> None:
    """Writes `content` as JSON with sorted keys and an indent of 2."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def check_weights(folder: pathlib.Path, stem: str = "model") -> None:
    """Raises an error unless the folder holds STEM.safetensors or the index of its shards.

    Raises:
      FileNotFoundError: it holds neither.
      ValueError: it holds neither, but a pickle.
    """
    weights, index = _names(stem)
    if (folder / weights).is_file() or (folder / index).is_file():
        return
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
        raise ValueError(pickle_message(pickles[0]))
    raise FileNotFoundError(f"{folder} has no {weights} and no {index}: the folder is incomplete, copy it again")


def refuse_adapter(folder: pathlib.Path) -> None:
    """Raises ValueError if a folder holds a LoRA adapter instead of a model's weights."""
    weights, index = _names("model")
    if (folder / weights).is_file() or (folder / index).is_file():
        return
    if found := [name for name in ADAPTER if (folder / name).is_file()]:
        base = read_object(folder / found[0]).get("base_model_name_or_path") if found[0] == ADAPTER[0] else None
        raise ValueError(
            f"{folder} holds a LoRA adapter ({found[0]}), not a model: merge it into its base model {base or ''} with "
            "`merge_and_unload()` of peft, and give the folder that `save_pretrained` then writes"
        )


def _names(stem: str) -> tuple[str, str]:
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


def pickle_message(file: pathlib.Path) -> str:
    """Returns the error message that refuses a pickle and says how to convert it."""
    return (
        f"{file} is a pickle, which can run any code when it is loaded: convert it to safetensors first, with "
        "`save_pretrained(folder)` in transformers or safetensors.torch.save_file"
    )


def open_weights(folder: pathlib.Path, stem: str = "model") -> dict[str, Tensor]:
    """Opens STEM.safetensors or the shards that its index names: tensors by name, each read when it is indexed.

    Raises:
      FileNotFoundError: the weights or one of their shards are missing.
      ValueError: the weights are a pickle, a file is truncated or damaged, or index and shards disagree.
    """
    check_weights(folder, stem)
    weights, index = _names(stem)
    if (folder / weights).is_file():
        return _open(folder / weights)
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / index} has no weight_map: copy it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if pathlib.PurePath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{folder / index} names the shard {shard!r}, which is not a safetensors file beside it")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing: {index} names it, copy the model directory again")
        tensors |= {name: x for name, x in _open(folder / shard).items() if weight_map.get(name, shard) == shard}
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{folder / weight_map[missing[0]]} lacks tensor {missing[0]} of {index}: copy it again")
    return tensors


def _open(file: pathlib.Path) -> dict[str, Tensor]:
    refuse_pointer(file)
    try:
        opened = safe_open(file, framework="numpy")
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): copy or export it again") from error


def save_weights(
    folder: pathlib.Path, tensors: Mapping[str, Outgoing], dtype: str | None = None, stem: str = "model"
) -> str:
    """Writes STEM.safetensors, or shards of at most MAX_SHARD_BYTES and their index, one shard in memory at a time.

    A tensor larger than MAX_SHARD_BYTES gets a shard of its own.

    Args:
      folder: an existing folder.
      tensors: result of `to_torch`.
      dtype: dtype of floating tensors, "float32", "bfloat16" or "float16"; None keeps the stored one of each.
      stem: the file name without its suffix.

    Returns:
      The name of the floating dtype that takes up most bytes.

    Raises:
      ValueError: `dtype` is unknown, or a value exceeds float16's range.
      OSError: a file cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    targets = {
        name: DTYPES[dtype] if dtype is not None and x.dtype in DTYPES.values() else x.dtype
        for name, x in tensors.items()
    }
    sizes = {name: int(np.prod(x.shape)) * targets[name].itemsize for name, x in tensors.items()}
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = {}
    for i, names in enumerate(shards):
        file = _names(stem)[0] if len(shards) == 1 else f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        files |= dict.fromkeys(names, file)
        # safetensors writes the memory behind an array in its own order, so transposed views are copied first.
        content = {name: np.array(_cast(name, tensors[name], targets[name]), order="C", copy=None) for name in names}
        (folder / file).touch()
        mode = (folder / file).stat().st_mode  # safetensors would make the file readable by its owner alone
        try:
            save_file(content, folder / file, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        (folder / file).chmod(mode)
    if len(shards) > 1:
        write_json(folder / _names(stem)[1], {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})
    floats = {name: kind for name, kind in DTYPES.items() if kind in targets.values()} or {"float32": None}
    return max(floats, key=lambda kind: sum(size for n, size in sizes.items() if targets[n] == floats[kind]))


def _cast(name: str, tensor: Outgoing, dtype: np.dtype) -> np.ndarray:
    """Reads a tensor as `dtype`; raises ValueError if a finite value overflows float16."""
    x = tensor.read()
    with np.errstate(over="ignore"):
        y = x.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(y).all() and np.isfinite(x).all():
        raise ValueError(f"tensor {name} has values beyond float16's 65504: write bfloat16 or float32")
    return y
