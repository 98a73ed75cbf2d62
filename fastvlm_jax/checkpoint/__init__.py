"""Saves, proves, restores and reads the checkpoints of a run.

A checkpoint holds all that the next step depends on: the state, the data position, and where the model comes from.
With it stands a digest of every array, taken on the devices before anything is copied. Whoever reads an array compares:
a run that goes on compares what lies on its devices; a command that reads a model, each array when it comes to it.
"""

from fastvlm_jax.checkpoint.arrays import load_variables
from fastvlm_jax.checkpoint.folder import FOLDER, Damaged, find, read_notes, steps_of
from fastvlm_jax.checkpoint.restoring import restore, set_back
from fastvlm_jax.checkpoint.saving import Checkpointer, Retention, open_checkpointer, raise_failed, save
from fastvlm_jax.checkpoint.survey import kept_aside, summarize, verify

__all__ = [
    "FOLDER",
    "Checkpointer",
    "Damaged",
    "Retention",
    "find",
    "kept_aside",
    "load_variables",
    "open_checkpointer",
    "raise_failed",
    "read_notes",
    "restore",
    "save",
    "set_back",
    "steps_of",
    "summarize",
    "verify",
]  # fmt: skip
