"""Reads the final schedules that the TPU compiler has written, one a compiled instruction: see `topology.devices`."""

import contextlib
import pathlib
import re

from fastvlm_jax.preflight.hlo import schedule
from fastvlm_jax.preflight.hlo.schedule import Schedule
from fastvlm_jax.preflight.topology import schedules_folder

_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")


def clear() -> None:
    """Deletes the schedules of the programs before."""
    for file in _files():
        file.unlink()


def schedules() -> dict[str, Schedule]:
    """Returns the counts of each instruction that was compiled since `clear`, by name.

    {} if the compiler was loaded outside of `topology.devices`, or with dump flags of the user's own.
    """
    found = {}
    for file in _files():
        if named := _FILE.fullmatch(file.name):
            with contextlib.suppress(ValueError):  # written in another way: the report tells that there is none
                found[named[1]] = schedule.count(file.read_text())
    return found


def _files() -> list[pathlib.Path]:
    return [file for file in schedules_folder().iterdir() if file.is_file()]
