"""Keeps a data set apart from others in the same folder: a file in it says what the set was made from."""

import json
import os
import pathlib
from typing import Any

from fastvlm_jax.data.sources import incomplete_shards, read_manifest
from fastvlm_jax.files import write_json


def describe(path: pathlib.Path, described: dict[str, Any]) -> None:
    """Writes what a data set is made from to a file of its folder, unless the file says the same already.

    Raises:
      ValueError: see `is_described`.
    """
    if not is_described(path, described):
        write_json(path, described)


def is_described(path: pathlib.Path, described: dict[str, Any]) -> bool:
    """Returns whether a file says what a data set is made from; it may say more.

    Raises:
      ValueError: its folder is a file, or holds another data set, or the beginning of one.
    """
    output = path.parent
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: choose a folder")
    if not path.is_file():
        if read_manifest(output)["splits"]:
            raise ValueError(f"{output} already holds another data set: choose another folder")
        return False
    try:
        known = json.loads(path.read_bytes())
        before = {key: known[key] for key in described}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete {output} and write the data set again") from error
    for key in described:
        if before[key] != described[key]:
            changed = f"{key}={before[key]}, not {described[key]}"
            raise ValueError(f"{output} already holds a set with {changed}: choose another folder")
    return True


def is_there(folder: str | os.PathLike, split: str) -> bool:
    """Returns whether a split of the data set in a folder is complete."""
    manifest = read_manifest(folder)
    return split in manifest["splits"] and not incomplete_shards(folder, manifest, split)
