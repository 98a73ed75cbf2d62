"""Workdirs and Orbax checkpoints: state, data position and lineage.

WORKDIR/config.json              the settings and the lineage of the run
WORKDIR/processor/               tokenizer, template and image settings
WORKDIR/checkpoints/STEP/        "model": parameters and batch statistics; "training": optimizer state and step
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

import jax
import jaxlib
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from fastvlm_jax import distributed
from fastvlm_jax.config import differences
from fastvlm_jax.convert.mapping import SAME, Leaf
from fastvlm_jax.data.load.loader import Loader
from fastvlm_jax.files import read_object
from fastvlm_jax.processor import Processor
from fastvlm_jax.train_state import TrainState

FORMAT = "fastvlm_jax workdir"
SHARED_WRITE_BYTES = 2**20  # replicas share in writing an array of this size; each shape of a part is a compilation
# What may change between the parts of one run: none of it changes the result (accumulate: unless BatchNorm trains or
# drop_path draws).
FREE_KEYS = (
    "mesh", "log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches", "eval_questions",
    "wandb", "accumulate", "shard_frozen", "model.vision.remat", "model.llm.remat", "data.num_threads", "data.prefetch",
    "data.cache_images", "data.path", "data.root",
)  # fmt: skip


# What may differ between the processes of one run: where each finds the data, and how it reads them.
OWN_KEYS = ("path", "root", "num_threads", "prefetch", "cache_images")


def check_processes(config: dict[str, Any]) -> None:
    """Raises ValueError, naming process and key, where the processes of a run have other settings or another code."""
    shared = {**config, "data": {key: value for key, value in config["data"].items() if key not in OWN_KEYS}}
    code = {"version": importlib.metadata.version("fastvlm_jax"), "sources": distributed.source_digest()}
    compiler = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flags": os.environ.get("LIBTPU_INIT_ARGS")}
    distributed.check_same({"config": shared, "code": code, **compiler})


def claim(workdir: pathlib.Path, config: dict[str, Any], lineage: dict[str, Any], processor: Processor) -> None:
    """Writes config.json and the processor of a fresh workdir, or checks that it is of the same settings and data.

    Of several processes the first does it; the others wait for it.

    Raises:
      ValueError: the workdir belongs to other settings, or is a folder of something else; not all processes have the
        same data and parent, or see the workdir.
      TimeoutError: a process does not come.
    """
    distributed.check_same(lineage)
    problem = None
    if jax.process_index() == 0:
        try:
            _claim(workdir, config, lineage)
            processor.save(workdir / "processor")
        except ValueError as error:
            problem = str(error)
    if problems := list(filter(None, distributed.exchange("workdir", problem, distributed.START_SECONDS))):
        raise ValueError(problems[0])
    # A network file system may show a new file late.
    for _ in range(60):
        if (workdir / "config.json").exists():
            return
        time.sleep(1)
    raise ValueError(
        f"process {jax.process_index()} does not see {workdir / 'config.json'}, which process 0 wrote: --workdir must "
        "be on a file system that all processes share"
    )


def _claim(workdir: pathlib.Path, config: dict[str, Any], lineage: dict[str, Any]) -> None:
    path = workdir / "config.json"
    if path.exists():
        found = read_run(workdir)
        differ = [d for d in differences(found["config"], config) if d[0] not in FREE_KEYS and not _moved(*d)]
        for key in ("data_fingerprint", "parent_step"):
            if found["lineage"].get(key) != lineage.get(key):
                differ.append((key, found["lineage"].get(key), lineage.get(key)))
        if differ:
            key, there, here = differ[0]
            raise ValueError(
                f"{workdir} is in use by a run with other settings: {key} is {there!r} there and {here!r} here "
                f"({len(differ)} differ); choose another --workdir"
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and not a training workdir; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"format": FORMAT, "config": config, "lineage": lineage}, indent=2) + "\n")
    os.replace(temporary, path)


def _moved(key: str, there: Any, here: Any) -> bool:
    """Whether it is the parent, of the same name in another place: a bucket is mounted elsewhere on other machines."""
    names = [[path.rpartition("/")[2] for path in str(paths).split(",")] for paths in (there, here)]
    return key == "parent" and names[0] == names[1]


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """The config.json of a workdir: {"format", "config", "lineage"} (ValueError if it is of something else)."""
    path = workdir / "config.json"
    run = read_object(path)
    if run.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a training workdir")
    return run


def find_latest(checkpointer: ocp.training.Checkpointer) -> int | None:
    """The step of the latest checkpoint, the same in all processes; None before the first.

    Raises:
      ValueError: a process does not see it.
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


def make_lineage(config: dict[str, Any], parent: dict[str, Any] | None, fingerprint: str) -> dict[str, Any]:
    """Where a model comes from: stage, parent with its own lineage, code version and data fingerprint."""
    return {
        "stage": config["stage"],
        "code": importlib.metadata.version("fastvlm_jax"),
        "jax": jax.__version__,
        "data_fingerprint": fingerprint,
        "parent": parent,
        "parent_step": None if parent is None else parent.get("step"),
    }


def open_checkpointer(workdir: pathlib.Path, keep: int) -> ocp.training.Checkpointer:
    """An asynchronous checkpointer that keeps the latest `keep` checkpoints; folders of killed saves are removed."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SHARED_WRITE_BYTES
    return ocp.training.Checkpointer(
        (workdir / "checkpoints").absolute(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
        context=context,
    )


def save(checkpointer: ocp.training.Checkpointer, state: TrainState, loader: Loader, lineage: dict[str, Any]) -> None:
    """Starts writing the checkpoint of `state.step` (waiting for the one before), unless it is there already."""
    step = int(state.step)
    if checkpointer.latest is not None and checkpointer.latest.step >= step:
        return
    checkpointer.wait()  # raises what went wrong with the last save
    checkpointer.save_checkpointables_async(
        step,
        {
            "model": {"params": state.params, "batch_stats": state.batch_stats},
            "training": {"step": state.step, "opt_state": state.opt_state},
        },
        custom_metadata={"position": loader.position, "lineage": lineage},
    )


def restore(checkpointer: ocp.training.Checkpointer, target: TrainState) -> tuple[TrainState, int]:
    """(state, data position) of the latest checkpoint, as the abstract `target` is laid out, whatever mesh wrote it."""
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
    """(workdir, checkpoint folder) if `path` is a training workdir or one checkpoint in it, else None.

    Raises:
      ValueError: a workdir without a finished checkpoint.
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
    steps = [p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit() and ocp.is_orbax_checkpoint(p)]
    if not steps:
        raise ValueError(f"{workdir} has no finished checkpoint yet; train it first")
    return workdir, max(steps, key=lambda p: int(p.name))


def load_variables(checkpoint: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The parameters and batch statistics of a checkpoint, without its optimizer state, as Leaves: read when asked for.

    Orbax stores every array for TensorStore, under its path joined by dots. Several layers of one array are asked for
    in turn on export, and a chunk of the file may hold them all: the one in use is kept.
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
    """An array of TensorStore that is read when it is indexed."""

    array: tensorstore.TensorStore

    def __getitem__(self, index) -> np.ndarray:
        return self.array[index].read().result()
