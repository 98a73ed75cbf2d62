"""Knows the folders of checkpoints, and reads what a checkpoint says about itself.

WORKDIR/checkpoints/STEP/                        a checkpoint, written by Orbax under another name and then renamed
    _CHECKPOINT_METADATA                         JSON; "custom_metadata" holds the notes, see `read_notes`
    model/, training/                            arrays in TensorStore's format, see arrays.py
WORKDIR/checkpoints/STEP.orbax-checkpoint-tmp/   what a killed save left; the next run removes it
WORKDIR/checkpoints/STEP.removed/                one that retention is removing
WORKDIR/checkpoints/STEP.damaged/                one that a run could not go on from and set aside; nothing removes it
"""

import itertools
import json
import pathlib
from typing import Any

from fastvlm_jax.files import json_digest, read_object, read_small
from fastvlm_jax.workdir import FORMAT

FOLDER = "checkpoints"  # in a workdir
METADATA = "_CHECKPOINT_METADATA"
UNSEALED = {"position", "passed_over", "lineage"}  # notes of a version that stored no digests


class Damaged(ValueError):
    """Raised where a checkpoint is not what was saved.

    Attributes:
      reason: the file or array at fault, and what is wrong with it.
    """

    def __init__(self, folder: pathlib.Path, reason: str):
        super().__init__(
            f"{folder} is damaged: {reason}; `fastvlm checkpoint verify {folder.parent.parent}` tells which "
            "checkpoints are whole"
        )
        self.reason = reason


def steps_of(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints of a workdir, in order."""
    return sorted(int(path.name) for path in (workdir / FOLDER).glob("*") if path.name.isdecimal() and path.is_dir())


def find(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Returns (workdir, checkpoint folder) if `path` is a training workdir or one checkpoint in it, else None.

    For a workdir the checkpoint is the latest one.

    Raises:
      ValueError: the workdir has no finished checkpoint, or `path` is an unfinished one.
    """
    path = path.absolute()
    for workdir in (path, path.parent.parent):
        config = workdir / "config.json"
        if config.is_file() and FORMAT.encode() in read_small(config):
            break
    else:
        return None
    if workdir != path:
        if not path.is_dir() or not path.name.isdecimal():
            raise ValueError(f"{path} is not a finished checkpoint of {workdir}")
        return workdir, path
    if not (steps := steps_of(workdir)):
        raise ValueError(f"{workdir} has no finished checkpoint yet; train it first")
    return workdir, workdir / FOLDER / str(steps[-1])


def seal(notes: dict[str, Any]) -> dict[str, Any]:
    """Returns notes with their own digest, "seal", as `read_notes` expects them."""
    notes = json.loads(json.dumps(notes))
    return {**notes, "seal": json_digest(notes)}


def read_notes(folder: pathlib.Path) -> dict[str, Any]:
    """Reads what a checkpoint says about itself.

    Returns:
      "position", the next batch of the data schedule; "passed_over", batches that are not drawn; "lineage", see
      workdir.make_lineage; "digests", {"model": {array: digest}, "training": ...}, or None in a checkpoint of a version
      that stored none; with adapters "base", {"digests": {array: digest}} of the parameters that it leaves out.

    Raises:
      Damaged: the file is missing or is not what was written.
    """
    try:
        notes = dict(read_object(folder / METADATA)["custom_metadata"])
    except FileNotFoundError as error:
        raise Damaged(folder, f"{METADATA} is missing" if folder.is_dir() else "the folder is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(folder, f"{METADATA} is not readable") from error
    sealed = notes.pop("seal", None)
    if sealed is None and "position" in notes and notes.keys() <= UNSEALED:
        return {"passed_over": [], **notes, "digests": None}
    if sealed != json_digest(notes):
        raise Damaged(folder, f"{METADATA} is not what was written")
    return notes


def set_aside(folder: pathlib.Path) -> pathlib.Path:
    """Renames a damaged checkpoint so that no run takes it up, and returns its new path."""
    names = (f"{folder.name}.damaged{number}" for number in itertools.chain([""], itertools.count(2)))
    target = next(path for path in map(folder.with_name, names) if not path.exists())
    return folder.rename(target)
