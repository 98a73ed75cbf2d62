"""Restores the latest checkpoint that is whole, on any mesh, and sets aside the damaged ones after it."""

import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from fastvlm_jax import disk, distributed, guard, sharding
from fastvlm_jax.checkpoint import digest
from fastvlm_jax.checkpoint.arrays import differs, load_shards, names_of
from fastvlm_jax.checkpoint.folder import Damaged, read_notes, set_aside
from fastvlm_jax.checkpoint.saving import Checkpointer, digests_of_base, joined_state, parts_of
from fastvlm_jax.train_state import TrainState


class Restored(NamedTuple):
    """Holds what a checkpoint says of a run.

    Attributes:
      state: the state, laid out as asked.
      position: data position, the number of the next batch; see Loader.position.
      passed_over: numbers of batches that are not drawn.
    """

    state: TrainState
    position: int
    passed_over: tuple[int, ...]


def restore(checkpointer: Checkpointer, target: TrainState) -> Restored:
    """Reads the latest checkpoint that is whole, which any mesh may have written.

    Each process reads the shards of its devices, and the devices compute the digests of what they got. A checkpoint in
    which any process finds damage is left out by all. Those after the one that is used are renamed STEP.damaged.

    Args:
      target: the state as ShapeDtypeStructs; their shardings become those of the result.

    Raises:
      ValueError: no checkpoint is whole, or the base of its adapters is another; nothing is renamed.
      OSError: the save under way failed; see `raise_failed`.
    """
    checkpointer.wait()
    damaged: dict[int, str] = {}
    base = _place_base(checkpointer, target)
    for step in reversed(checkpointer.steps):
        restored, reason = _try(checkpointer.folder(step), target, base, checkpointer.base_digests)
        if restored is not None:
            for bad, why in damaged.items():
                _set_aside(checkpointer, bad, "is damaged", f"{why}; the run goes on behind step {step}")
            return restored
        damaged[step] = reason
    reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
    raise ValueError(
        f"no checkpoint in {checkpointer.folder(0).parent} is whole ({reasons}): copy one there again, or choose "
        "another --workdir"
    )


def _place_base(checkpointer: Checkpointer, target: TrainState) -> dict[str, jax.Array]:
    """Returns the parameters that no checkpoint holds, as `target` lays them out, and notes their digests."""
    wanted = flatten_dict(target.params, sep="/")
    base = {
        path: sharding.place(leaf, wanted[path].sharding, wanted[path].dtype)
        for path, leaf in checkpointer.base.items()
    }
    if base:
        checkpointer.base_digests = digests_of_base(base, base)
    return base


def _try(
    folder: pathlib.Path, target: TrainState, base: dict[str, jax.Array], base_digests: dict[str, str] | None
) -> tuple[Restored | None, str]:
    """Reads a checkpoint: (what it holds, ""), or (None, what is wrong with it), the same in all processes."""
    try:
        notes, parts, problem = *_read(folder, target, base), ""
    except Damaged as error:
        problem = error.reason
    # The digests are sums over the devices of all processes: all must have read their shards before.
    if problem := _first(f"{folder.name} read", problem):
        return None, problem
    if base and notes.get("base", {}).get("digests") != base_digests:
        raise ValueError(
            f"{folder} holds adapters of another model than the `parent` of this run is now: give the parent that it "
            "began with, or choose another --workdir"
        )
    if notes["digests"]:
        problem = _first(f"{folder.name} compared", _compare(folder, parts, notes["digests"]))
    if problem:
        return None, problem
    if "guard" not in parts["training"]:
        layouts = jax.tree.map(lambda x: x.sharding, target.guard)
        parts["training"]["guard"] = jax.jit(guard.begin, out_shardings=layouts)()
    return Restored(joined_state(parts, base), notes["position"], tuple(notes["passed_over"])), ""


def _read(folder: pathlib.Path, target: TrainState, base: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    notes, wanted = read_notes(folder), parts_of(target, base)
    if "guard.norms" not in (notes["digests"]["training"] if notes["digests"] else names_of(folder, "training")):
        del wanted["training"]["guard"]  # of a version that judged no step
    return notes, {part: load_shards(folder, part, tree) for part, tree in wanted.items()}


def _compare(folder: pathlib.Path, parts: dict[str, Any], digests: dict[str, dict[str, str]]) -> str:
    """Returns which array is not what was saved, "" if all are."""
    for part, tree in parts.items():
        found, _ = digest.of_tree(tree)
        for name, text in found.items():
            if text != digests[part].get(name):
                return differs(folder, part, name).reason
    return ""


def _first(what: str, problem: str) -> str:
    """Returns the problem of the first process that has one, "" if none has."""
    problems = distributed.exchange(f"checkpoint {what}", problem, distributed.START_SECONDS)  # disks differ in speed
    return next(filter(None, problems), "")


def set_back(checkpointer: Checkpointer, first: int) -> None:
    """Sets aside the checkpoints from step `first` on, so that a run goes back behind them: they are of bad steps."""
    checkpointer.wait()
    for step in [step for step in checkpointer.steps if step >= first]:
        _set_aside(checkpointer, step, "is left out", f"it was saved among bad steps, which began with {first}")


def _set_aside(checkpointer: Checkpointer, step: int, what: str, reason: str) -> None:
    checkpointer.steps.remove(step)
    if jax.process_index() == 0:
        folder = checkpointer.folder(step)
        renamed = f"it is kept as {set_aside(folder)}" if folder.is_dir() else "it is gone"
        disk.tell(f"WARNING: {folder} {what}, {renamed}: {reason}")
    distributed.exchange(f"checkpoint {step} set aside")
