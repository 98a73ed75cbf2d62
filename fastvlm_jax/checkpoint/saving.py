"""Saves the checkpoints of a run in the background, reports saves that failed, and removes those that may go."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from fastvlm_jax import disk, distributed
from fastvlm_jax.checkpoint import digest
from fastvlm_jax.checkpoint.folder import FOLDER, seal, steps_of
from fastvlm_jax.train_state import TrainState, averaged

# Arrays of at least this size are written by all replicas, each a part; every new shape of a part costs a compilation.
SHARED_WRITE_BYTES = 2**20
LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.removed")  # see folder.py


@dataclasses.dataclass(frozen=True)
class Retention:
    """Says which checkpoints stay when another is written.

    Attributes:
      latest: number of latest checkpoints.
      every: the first checkpoint at or behind each step that it divides stays for good; 0 = none.
      best: returns the step of one more; None for none.
      held: returns whether all stay for now, because the run may have to go back behind the next one.
    """

    latest: int
    every: int = 0
    best: Callable[[], int | None] = lambda: None
    held: Callable[[], bool] = lambda: False

    def removed(self, steps: Sequence[int]) -> list[int]:
        """Returns which of the steps, in order, need not stay."""
        if self.held():
            return []
        stay = {self.best(), *steps[-self.latest :]}
        if self.every:  # a save among bad steps comes late
            stay |= {s for before, s in zip([0, *steps], steps, strict=False) if s // self.every > before // self.every}
        return [step for step in steps if step not in stay]


class Checkpointer:
    """Holds the checkpoints of a run, the same in all processes.

    Attributes:
      workdir: its workdir.
      steps: steps of its checkpoints in order; the last may still be being written.
      retention: which of them stay.
      base: arrays or Leaves of the base of adapters, by path, which no checkpoint holds; empty without adapters.
      base_digests: digests of those on the devices; None before they are known.
      saving: the save under way or the one before it; None before the first.
    """

    def __init__(self, workdir: pathlib.Path, steps: list[int], retention: Retention, base: Mapping[str, Any]):
        self.workdir, self.steps, self.retention, self.base = workdir, steps, retention, base
        self.base_digests: dict[str, str] | None = None
        self.saving: concurrent.futures.Future | None = None
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self.context = ocp.Context()
        self.context.array.saving.min_slice_bytes_for_replica_parallel = SHARED_WRITE_BYTES

    @property
    def latest(self) -> int | None:
        """Returns the step of the latest checkpoint; None before the first."""
        return self.steps[-1] if self.steps else None

    def folder(self, step: int) -> pathlib.Path:
        """Returns the folder of the checkpoint of a step."""
        return (self.workdir / FOLDER / str(step)).absolute()

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          OSError: it failed; see `raise_failed`.
        """
        if self.saving is not None:
            concurrent.futures.wait([self.saving])
            raise_failed(self)

    def close(self) -> None:
        """Waits for the save under way, the last one; raises what `wait` does."""
        self.thread.shutdown()
        raise_failed(self)


def open_checkpointer(
    workdir: pathlib.Path, retention: Retention, base: Mapping[str, Any] = MappingProxyType({})
) -> Checkpointer:
    """Opens the checkpoints of a run in all processes, and removes what killed saves left. `base`: see Checkpointer.

    Raises:
      ValueError: a process does not see the checkpoint that another sees; the message names both.
    """
    if jax.process_index() == 0:
        for path in (path for pattern in LEFTOVERS for path in (workdir / FOLDER).glob(pattern)):
            shutil.rmtree(path)
    return Checkpointer(workdir, find_steps(workdir), retention, base)


def find_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints of a workdir, the same in all processes.

    Raises:
      ValueError: a process does not see the checkpoint that another sees; the message names both.
    """
    for turn in range(60):  # a network file system may show a new folder late
        found = distributed.exchange(f"checkpoints {turn}", steps_of(workdir))
        latest = [steps[-1] if steps else -1 for steps in found]
        if len(set(latest)) == 1:
            return found[0]
        time.sleep(1)
    behind, ahead = latest.index(min(latest)), latest.index(max(latest))
    raise ValueError(
        f"process {behind} does not see the checkpoint of step {max(latest)}, which process {ahead} does: --workdir "
        "must be on a file system that all processes share"
    )


def parts_of(state: TrainState, base: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Returns a state in the parts of a checkpoint: what a model is, and what else training needs.

    Parameters whose paths are in `base` are left out. Where a state keeps moving averages, they are the model, and what
    they average is training's.
    """
    training = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
    if state.average is not None:
        flat = flatten_dict(state.params, sep="/")
        last = {path: flat[path] for path in state.average["params"]}
        training["last"] = {"params": last, "batch_stats": state.batch_stats}
    model = averaged(state)
    if base:
        kept = {path: x for path, x in flatten_dict(model["params"], sep="/").items() if path not in base}
        model = {**model, "params": unflatten_dict(kept, sep="/")}
    return {"model": model, "training": training}


def joined_state(parts: dict[str, dict[str, Any]], base: Mapping[str, Any] = MappingProxyType({})) -> TrainState:
    """Returns the state that `parts_of` took apart; `base` are the parameters that it left out, by path."""
    model, training = dict(parts["model"]), dict(parts["training"])
    if base:
        model["params"] = unflatten_dict({**flatten_dict(model["params"], sep="/"), **base}, sep="/")
    last = training.pop("last", None)
    if last is None:
        return TrainState(**model, **training)
    flat = flatten_dict(model["params"], sep="/")
    average = {"params": {path: flat[path] for path in last["params"]}, "batch_stats": model["batch_stats"]}
    params = unflatten_dict(flat | last["params"], sep="/")
    return TrainState(params=params, batch_stats=last["batch_stats"], average=average, **training)


def save(
    checkpointer: Checkpointer,
    state: TrainState,
    position: int,
    *,
    passed_over: Sequence[int] = (),
    lineage: dict[str, Any],
) -> None:
    """Starts writing the checkpoint of `state.step` in the background, once the save before it has ended.

    A checkpoint of this step that is there already stays as it is. The digests are of the arrays on the devices.

    Args:
      position: data position, the number of the next batch; see Loader.position.
      passed_over: numbers of batches that are not drawn.
      lineage: where the model comes from; see workdir.make_lineage.

    Raises:
      FloatingPointError: an array is not finite; nothing is saved.
      OSError: see `raise_failed`.
    """
    step = int(state.step)
    if checkpointer.steps and checkpointer.steps[-1] >= step:
        return
    parts, digests = parts_of(state, checkpointer.base), {}
    for part, tree in parts.items():
        digests[part], infinite = digest.of_tree(tree)
        if infinite:
            raise FloatingPointError(
                f"{len(infinite)} arrays of the state at step {step}, {infinite[0]} first, hold numbers that are not "
                "finite, and it is not saved: lower the rates in groups"
            )
    checkpointer.wait()
    notes = {"position": position, "passed_over": list(passed_over), "lineage": lineage, "digests": digests}
    if checkpointer.base:
        if checkpointer.base_digests is None:
            checkpointer.base_digests = digests_of_base(flatten_dict(state.params, sep="/"), checkpointer.base)
        notes["base"] = {"digests": checkpointer.base_digests}
    checkpointer.steps.append(step)
    going = checkpointer.retention.removed(checkpointer.steps)
    try:
        _check_disk(checkpointer.folder(step))
        with checkpointer.context:
            written = ocp.save_checkpointables_async(checkpointer.folder(step), parts, custom_metadata=seal(notes))
    except OSError as error:
        raise not_written(checkpointer, error) from error
    checkpointer.saving = checkpointer.thread.submit(_finish, checkpointer, written, going)


def digests_of_base(params: Mapping[str, jax.Array], base: Collection[str]) -> dict[str, str]:
    """Returns the digests of the parameters whose paths are in `base`, by name; all processes call it together."""
    return digest.of_tree({"params": unflatten_dict({path: params[path] for path in base}, sep="/")})[0]


def _check_disk(folder: pathlib.Path) -> None:
    """Raises OSError if no folder can be made beside a checkpoint.

    Orbax makes it in the background, and if that fails its threads hold up the end of the process for minutes.
    """
    if jax.process_index() == 0:
        folder.parent.mkdir(exist_ok=True)
        tried = folder.with_name(f"{folder.name}.removed")
        tried.mkdir()
        tried.rmdir()


def _finish(checkpointer: Checkpointer, written, going: list[int]) -> None:
    """Runs in the checkpointer's thread: waits until a checkpoint is written, then removes the checkpoints `going`."""
    try:
        written.result()
    except Exception as error:
        raise not_written(checkpointer, error) from error
    checkpointer.steps = [step for step in checkpointer.steps if step not in going]
    if jax.process_index() == 0:
        for folder in map(checkpointer.folder, going):
            with contextlib.suppress(FileNotFoundError):  # somebody has removed it to make space
                # Under its own name a checkpoint is whole, even if the process is killed here.
                shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.removed")))


def raise_failed(checkpointer: Checkpointer) -> None:
    """Raises the error of a save that failed in the background. It costs next to nothing: call it after every step.

    Only the process whose disk failed raises it; it stops the others, which name it.

    Raises:
      OSError: the message names the folder that was not written, the reason and the latest checkpoint.
    """
    if checkpointer.saving is not None and checkpointer.saving.done():
        done, checkpointer.saving = checkpointer.saving, None
        done.result()


def not_written(checkpointer: Checkpointer, error: Exception) -> OSError:
    """Returns the error for a checkpoint that could not be written, with the disk's reason and the latest one."""
    folder = checkpointer.folder(checkpointer.steps.pop())
    latest = f"the last one is of step {checkpointer.latest}" if checkpointer.steps else "there is none before it"
    quoted = re.search(r"Errno (\d+)", str(error))  # Python's words, which Orbax may quote
    found = disk.error_in(str(error)) or (quoted and OSError(int(quoted[1]), os.strerror(int(quoted[1]))))
    if not found and not checkpointer.workdir.is_dir():
        found = OSError(errno.ENOENT, "the workdir is no longer there")
    if not found:
        return OSError(f"{folder} was not written ({str(error).partition(chr(10))[0]}); {latest}")
    return OSError(found.errno, f"{found.strerror}; this checkpoint was not written, {latest}", str(folder))
