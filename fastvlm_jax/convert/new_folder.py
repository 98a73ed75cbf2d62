"""Creates a model directory that appears under its name only when it is complete."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from fastvlm_jax.convert.recognise import recognise
from fastvlm_jax.convert.weight_files import ADAPTER

MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")  # suffixes of the files in a written model


@contextlib.contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields an empty folder beside `target` that replaces it when the block succeeds, and is removed when it fails.

    Raises:
      ValueError: `target` is a file or a folder that is not empty; with `overwrite`, a folder that holds anything
        other than a model or adapters.
    """
    target = pathlib.Path(target).expanduser().resolve()
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    if old.is_dir() and not target.exists():  # an earlier run was killed between the two renames below
        old.rename(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} is not empty: name another folder, or --overwrite the model in it")
        try:
            if not (target / ADAPTER[0]).is_file():
                recognise(target)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{target} holds something other than a model: name another folder") from error
        if others := sorted(x.name for x in target.iterdir() if not x.is_file() or x.suffix not in MODEL_FILES):
            raise ValueError(
                f"{target} holds {others[0]} beside a model, --overwrite would delete it: name another folder"
            )
    shutil.rmtree(partial, ignore_errors=True)  # leftover of a run that was killed
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
