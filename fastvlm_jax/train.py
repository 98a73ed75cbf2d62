"""One training run from top to bottom: mesh, parent, data, state, restore, loop."""

import math
import pathlib
from functools import partial
from typing import Any

import jax
import ml_collections

from fastvlm_jax import checkpoint, distributed, model_io, optim, sharding
from fastvlm_jax import config as config_lib
from fastvlm_jax.data.load.from_config import make_loader, open_sources
from fastvlm_jax.data.load.loader import Loader
from fastvlm_jax.data.sources import fingerprint
from fastvlm_jax.distributed import Interrupted, StopRequest
from fastvlm_jax.evaluate.validation import make_validation
from fastvlm_jax.metrics import profiling, tracking
from fastvlm_jax.metrics.throughput import flow_scalars, memory_scalars, mfu_scalars, peak_flops
from fastvlm_jax.metrics.writer import MetricsWriter
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.stage import adapt, make_processor, make_step
from fastvlm_jax.train_state import TrainState
from fastvlm_jax.workdir import check_processes, claim, make_lineage


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, devices=None, profile: str = "") -> TrainState:
    """Trains the stage that `config` describes, from its parent's weights or from where `workdir` stopped.

    Args:
      devices: what the mesh is made of; all devices by default.
      profile: steps to trace, "FIRST:LAST"; see profiling.py.

    Returns:
      The final state, which is also the last checkpoint of the workdir.

    Raises:
      ValueError, FileNotFoundError: settings, data, parent or workdir that do not fit; nothing was written.
      FloatingPointError: the loss is not finite.
      Interrupted: SIGINT or SIGTERM came, to this process or another; the state is saved.
    """
    config_lib.validate(config)
    settings = config_lib.plain(config)
    check_processes(settings)
    tracking.check(config.wandb)
    mesh = sharding.make_mesh(config.mesh, devices)
    num_kv_heads = config.model.llm.num_kv_heads
    sharding.check_mesh(mesh, groups=config.data.groups, num_kv_heads=num_kv_heads, accumulate=config.accumulate)
    parent = model_io.read(config.parent) if config.parent else None
    model = fastvlm.build(**config.model.to_dict())
    sources = open_sources(config.data, "train")
    processor = make_processor(config, model, parent)
    abstract_params = model_io.abstract_variables(model)["params"]
    trainable, _ = optim.split(abstract_params, config.groups)
    if config.model.vision.get("batch_norm") == "train" and not any(path.startswith("vision/") for path in trainable):
        raise ValueError("groups freeze the encoder, but its statistics move: set model.vision.batch_norm to 'frozen'")
    lineage = make_lineage(settings, parent and parent.lineage, fingerprint(sources))
    variables = adapt(parent, model) if parent else None

    with jax.set_mesh(mesh):
        batches = sharding.batch_sharding(mesh)
        open_loader = partial(make_loader, config.data, processor, "train", seed=config.seed, sharding=batches)
        loader = open_loader()
        steps = config.steps or math.ceil(config.epochs * loader.batches_per_epoch)
        step = make_step(config, model, mesh, steps=steps, num_sources=len(sources))
        traced = profiling.parse_steps(profile, steps)
        claim(workdir, settings, lineage, processor)
        checkpointer = checkpoint.open_checkpointer(workdir, config.keep_checkpoints)
        if checkpoint.find_latest(checkpointer) is not None:
            state, position = checkpoint.restore(checkpointer, step.abstract)
            loader.close()
            loader = open_loader(start=position)
        else:
            state = step.make_state(jax.random.key(config.seed), variables)
        return run(config, model, processor, state, step.fn, steps, loader, checkpointer, lineage, workdir, traced)


def run(
    config, model: FastVLM, processor: Processor, state: TrainState, step_fn, steps: int, loader: Loader, checkpointer,
    lineage: dict[str, Any], workdir: pathlib.Path, traced: tuple[int, int],
) -> TrainState:  # fmt: skip
    """The loop: step, metrics every `log_every`, validation every `eval_every`, checkpoints."""
    start = int(state.step)
    name = config.stage or workdir.name
    tracker = tracking.open_run(config.wandb, workdir, name, config_lib.plain(config))
    writer = MetricsWriter(workdir, name, start, steps, tracker)
    trace = profiling.Trace(traced, workdir / "profile", start, steps)
    devices, trainable = list(loader.sharding.mesh.devices.flat), tuple(optim.split(state.params, config.groups)[0])
    mfu = partial(mfu_scalars, model, trainable, row_length=config.data.row_length, peak=peak_flops(devices))
    validate = make_validation(config, model, processor, loader.sharding)
    stop = StopRequest()
    logged, last_logged = writer.seconds(), start
    try:
        with stop:
            for step in range(start + 1, steps + 1):
                with trace.begin(step, state):
                    state, metrics = step_fn(state, next(loader))
                trace.end(step, state)
                if step % config.log_every == 0 or step == steps:
                    by_source = metrics.pop("loss_by_source", None)
                    scalars = {key: float(value) for key, value in metrics.items()}
                    if not math.isfinite(scalars["loss"]):
                        raise FloatingPointError(
                            f"the loss at step {step} is {scalars['loss']}; the last checkpoint is of step "
                            f"{checkpointer.latest.step if checkpointer.latest else None}: lower the rates in groups"
                        )
                    seconds, logged = max(writer.seconds() - logged, 1e-9), writer.seconds()
                    scalars["step_seconds"], last_logged = seconds / (step - last_logged), step
                    scalars |= flow_scalars(loader, seconds, mfu)
                    scalars |= memory_scalars(devices)
                    # The slowest input holds all up.
                    scalars["input_bound"] = max(distributed.exchange(f"input {step}", scalars["input_bound"]))
                    if by_source is not None:
                        losses = zip(loader.names, by_source.tolist(), strict=True)
                        scalars |= {f"loss/{name}": loss for name, loss in losses if math.isfinite(loss)}
                    rates = optim.learning_rates(step, config.groups, steps, config.warmup_ratio)
                    scalars["lr"] = max(float(rate) for rate in rates.values())
                    writer.write(step, scalars)
                stopping = stop.reached(step)
                # Before the validation, which may end in an error or take longer than a preempted machine has.
                if step % config.checkpoint_every == 0 or step == steps or stopping:
                    checkpoint.save(checkpointer, state, loader, lineage)
                if (step % config.eval_every == 0 and not stopping) or step == steps:
                    if scalars := validate(state):
                        writer.write(step, scalars)
                    logged, last_logged = writer.seconds(), step
                    loader.flow()
                if stopping and step < steps:
                    raise Interrupted(
                        f"stopped at step {step} of {steps}, which is saved; the same command goes on from there"
                    )
        return state
    finally:
        trace.close()
        loader.close()
        checkpointer.close()
        writer.close()
