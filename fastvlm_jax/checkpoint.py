"""Saves and restores Orbax checkpoints of a run: state and data position.

WORKDIR/checkpoints/STEP/        "model": parameters and batch statistics; "training": optimizer state and step
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from fastvlm_jax import distributed
from fastvlm_jax.convert.mapping import SAME, Leaf
from fastvlm_jax.train_state import TrainState
from fastvlm_jax.workdir import FORMAT

# Arrays of at least this size are written by all replicas, each a part; every new shape of a part costs a compilation.
SHARED_WRITE_BYTES = 2**20
FOLDER = "checkpoints"  # in a workdir


def find_latest(checkpointer: ocp.training.Checkpointer) -> int | None:
    """Returns the step of the latest checkpoint, the same in all processes; None before the first.

    Raises:
      ValueError: a process does not see the checkpoint that another sees; the message names both.
    """
    for turn in range(60):  # a network file system may show a new folder late
        found = [-1 if step is None else step for step in distributed.exchange(f"latest {turn}", _latest(checkpointer))]
        if len(set(found)) == 1:
            return None if found[0] < 0 else found[0]
        time.sleep(1)
        checkpointer.reload()
    behind = found.index(min(found))
    raise ValueError(
        f"process {behind} does not see the checkpoint of step {max(found)}, which process {found.index(max(found))} "
        "does: --workdir must be on a file system that all processes share"
    )


def _latest(checkpointer: ocp.training.Checkpointer) -> int | None:
    return None if checkpointer.latest is None else checkpointer.latest.step


@dataclasses.dataclass(frozen=True)
class LatestAndBest:
    """Decides which checkpoints stay when another is written.

    Attributes:
      latest: number of latest checkpoints.
      best: returns the step of one more; None for none.
    """

    latest: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint, from the oldest, whether it stays; it is the method that Orbax calls."""
        best, first = self.best(), len(checkpoints) - self.latest
        return [i >= first or checkpoint.step == best for i, checkpoint in enumerate(checkpoints)]


def open_checkpointer(
    workdir: pathlib.Path, keep: int, best: Callable[[], int | None] = lambda: None
) -> ocp.training.Checkpointer:
    """Opens an asynchronous checkpointer of a run; removes what killed saves left.

    Args:
      keep: number of latest checkpoints that it keeps.
      best: returns the step of one more that it keeps; it is asked whenever a checkpoint is written.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SHARED_WRITE_BYTES
    return ocp.training.Checkpointer(
        (workdir / FOLDER).absolute(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=LatestAndBest(keep, best),
        cleanup_tmp_directories=True,
        context=context,
    )


def save(checkpointer: ocp.training.Checkpointer, state: TrainState, position: int, *, lineage: dict[str, Any]) -> None:
    """Starts writing the checkpoint of `state.step` in the background, once the save before it has ended.

    A checkpoint of this step that is there already stays as it is.

    Args:
      position: data position, the number of batches consumed; see Loader.position.
      lineage: where the model comes from; see workdir.make_lineage.
    """
    step = int(state.step)
    if checkpointer.latest is not None and checkpointer.latest.step >= step:
        return
    checkpointer.wait()  # raises the error of the save before
    checkpointer.save_checkpointables_async(
        step,
        {
            "model": {"params": state.params, "batch_stats": state.batch_stats},
            "training": {"step": state.step, "opt_state": state.opt_state},
        },
        custom_metadata={"position": position, "lineage": lineage},
    )


def restore(checkpointer: ocp.training.Checkpointer, target: TrainState) -> tuple[TrainState, int]:
    """Reads the latest checkpoint, which any mesh may have written: (state, data position).

    Args:
      target: the state as ShapeDtypeStructs; their shardings become those of the result.
    """
    found = checkpointer.load_checkpointables(
        None,
        {
            "model": {"params": target.params, "batch_stats": target.batch_stats},
            "training": {"step": target.step, "opt_state": target.opt_state},
        },
    )
    position = checkpointer.checkpointables_metadata(None).custom_metadata["position"]
    return TrainState(**found["training"], **found["model"]), position


def find(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    """Returns (workdir, checkpoint folder) if `path` is a training workdir or one checkpoint in it, else None.

    For a workdir the checkpoint is the latest one.

    Raises:
      ValueError: the workdir has no finished checkpoint, or `path` is an unfinished one.
    """
    path = path.absolute()
    for workdir in (path, path.parent.parent):
        config = workdir / "config.json"
        if config.is_file() and FORMAT in config.read_text(errors="replace"):
            break
    else:
        return None
    if workdir != path:
        if not path.is_dir() or not ocp.is_orbax_checkpoint(path):
            raise ValueError(f"{path} is not a finished checkpoint of {workdir}")
        return workdir, path
    if not (steps := finished(workdir)):
        raise ValueError(f"{workdir} has no finished checkpoint yet; train it first")
    return workdir, workdir / FOLDER / str(max(steps))


def finished(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints of a workdir."""
    return [int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit() and ocp.is_orbax_checkpoint(p)]


def load_variables(checkpoint: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Opens the parameters and batch statistics of a checkpoint as Leaves, which are read when they are used.

    Orbax stores every array in TensorStore's format under its path, joined by dots. An export reads an array layer by
    layer, but one chunk of the file may hold all layers: a cache keeps the chunk that is in use.

    Args:
      checkpoint: folder of the checkpoint.
      abstract: the model's variables as ShapeDtypeStructs.

    Raises:
      ValueError: an array is missing, damaged or of another shape; the message names it.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 8_000_000_000}})

    def leaf(path, x) -> Leaf:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        store = {"driver": "ocdbt", "base": f"file://{checkpoint / 'model'}", "path": f"{name}/"}
        try:
            array = tensorstore.open(
                {"driver": "zarr3", "kvstore": store}, open=True, read=True, context=context
            ).result()
        except ValueError as error:
            raise ValueError(f"{checkpoint} lacks {name} or is damaged: {str(error).partition(chr(10))[0]}") from error
        if array.shape != x.shape:
            raise ValueError(f"{checkpoint}: {name} has shape {array.shape}, its config.json asks for {x.shape}")
        return Leaf((StoredArray(array),), SAME, x.shape, np.dtype(array.dtype.numpy_dtype), stacked=False)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """Holds an array of TensorStore, which is read when it is indexed."""

    array: tensorstore.TensorStore

    def __getitem__(self, index) -> np.ndarray:
        return self.array[index].read().result()
