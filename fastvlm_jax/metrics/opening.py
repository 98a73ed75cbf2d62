"""Says on stderr how a run begins: its parts, parameters and data, what looks wrong, and how long compiling takes."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import ml_collections

from fastvlm_jax import config as config_lib
from fastvlm_jax import disk, optim
from fastvlm_jax.changes import Change, listed

FEW_STEPS = 20  # an epoch of fewer steps, in a run of fewer than five times as many, deserves a word


def tell(name: str, line: str) -> None:
    """Prints a line about the run `name`, in process 0 alone."""
    if jax.process_index() == 0:
        disk.tell(f"{name}: {line}")


def tell_model(name: str, config: ml_collections.ConfigDict, params: Any, given: dict[str, Any] | None) -> None:
    """Says which parts of a new model are the parent's, how many parameters it has and how many of them are trained.

    Args:
      params: all parameters, or their shapes.
      given: the parent's variables, without the parts that are initialized; None without a parent.
    """
    parent = (given or {}).get("params", {})
    ours = [part for part in params if part in parent]
    fresh = [part for part in params if part not in parent and part != "lora"]
    origins = [f"{', '.join(ours)} from {config.parent}"] if ours else []
    origins += [f"{', '.join(fresh)} from random weights"] if fresh else []
    origins += [f"new adapters of rank {config.lora.rank}"] if "lora" in params else []
    tell(name, "; ".join(origins))
    trainable, frozen = (sum(math.prod(x.shape) for x in t.values()) for t in optim.split(params, config.groups))
    total = trainable + frozen
    tell(name, f"{total:,} parameters, {trainable:,} of them trained ({trainable / total:.1%})")
    if "vision" in fresh and (problem := _idle_encoder(config, params)):
        settings = {"form": "branched", "batch_norm": "train"}
        flags = [
            f"--config.model.vision.{key}={value}, " for key, value in settings.items() if key in config.model.vision
        ]
        tell(
            name,
            f"WARNING: the encoder starts from random weights {problem}, so it can hardly learn to see: give it "
            "trained weights with --config.parent=vision=DIR,llm=DIR, or train it "
            f"({''.join(flags)}a rate above 0 in groups)",
        )


def _idle_encoder(config: ml_collections.ConfigDict, params: Any) -> str:
    """Returns what keeps an encoder from learning from scratch, "" if nothing does."""
    vision, found = config.model.vision, []
    if vision.get("form") == "folded":
        found.append("and stays folded")
    if vision.get("batch_norm") == "frozen":
        found.append("with frozen BatchNorm statistics")
    if not any(path.startswith("vision/") for path in optim.split(params, config.groups)[0]):
        found.append("at rate 0")
    return " ".join(found)


def tell_data(name: str, config: ml_collections.ConfigDict, records: int, per_epoch: int, steps: int) -> None:
    """Says how many records and steps there are; proposes smaller batches if an epoch and the run have few steps.

    Args:
      records: records of all data sets.
      per_epoch: batches in an epoch.
      steps: optimizer steps of the whole run.
    """
    groups = config.data.groups
    tell(name, f"{records:,} records in batches of {groups} groups; steps an epoch: {per_epoch:,}, in all: {steps:,}")
    smaller = max(config.accumulate, groups * per_epoch // (5 * FEW_STEPS) // config.accumulate * config.accumulate)
    few = per_epoch < FEW_STEPS and steps < 5 * FEW_STEPS
    if few and not config.steps and smaller < groups:
        tell(
            name,
            f"{per_epoch} {'step' if per_epoch == 1 else 'steps'} an epoch are few to learn from: "
            f"--config.data.groups={smaller} gives about {per_epoch * groups // smaller} (the data shards of the mesh "
            "must divide it)",
        )


def tell_changes(
    name: str,
    config: ml_collections.ConfigDict,
    changes: Sequence[Change],
    rows: Sequence[dict[str, float]],
    rates: Callable[[int], dict[str, float]],
    start: int,
    steps: int,
    skipped: int,
) -> None:
    """Says what changed in a run that goes on, and how its learning rate does if that may have changed.

    Args:
      rows: lines of metrics.jsonl.
      rates: number of updates -> learning rates by their names in the metrics.
      start: step that the run goes on behind.
      steps: optimizer steps of the whole run.
      skipped: steps up to `start` whose update was left out; the schedule does not count them.
    """
    if changes:
        tell(name, f"changed since it was last at work: {listed(changes, config_lib.plain(config))}")
    if start < steps and any(not change.free for change in changes):
        rate, end = rates(start + 1 - skipped)["lr"], rates(steps)["lr"]
        before = [row["lr"] for row in rows if "lr" in row and row["step"] <= start]
        was = f"was {before[-1]:.3g} in the last row of its metrics, " if before else ""
        now = f"is {rate:.3g} at step {start + 1}"
        tell(name, f"the learning rate {was}{now} and ends at {end:.3g} with step {steps}")


def telling_compilation(
    name: str, step_fn: Callable, doing: Callable[[str], AbstractContextManager] = contextlib.nullcontext
) -> Callable:
    """Returns a jitted (state, batch) function that says before and after when it is compiled: once for each size.

    Args:
      doing: returns a context for work that may take long; see Watchdog.doing.
    """
    sizes = set()

    def step(state, batch):
        if (size := batch.images.shape[2:4]) not in sizes:
            sizes.add(size)
            tell(name, f"compiling the training step for images of {size[0]} x {size[1]} px ...")
            start = time.monotonic()
            with doing("a compilation"):
                step_fn.lower(state, batch).compile()
            tell(name, f"compiled in {time.monotonic() - start:.1f} s")
        return step_fn(state, batch)

    return step
