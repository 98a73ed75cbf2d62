"""One training run from top to bottom: mesh, parent, data, state, restore, loop."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fastvlm_jax import checkpoint, distributed, evaluate, model_io, optim, profiling, sharding, tracking
from fastvlm_jax import config as config_lib
from fastvlm_jax.batch import Batch
from fastvlm_jax.convert.encoder import without_head
from fastvlm_jax.data.pipeline import Loader, data_sets, eval_batches, fingerprint, make_loader, open_sources
from fastvlm_jax.distributed import Interrupted, StopRequest
from fastvlm_jax.images.sizes import make_sizes
from fastvlm_jax.metrics import MetricsWriter, memory_scalars, mfu_scalars, peak_flops
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer
from fastvlm_jax.train_step import TrainState, eval_step, train_step


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
    checkpoint.check_processes(settings)
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
    lineage = checkpoint.make_lineage(settings, parent and parent.lineage, fingerprint(sources))
    variables = adapt(parent, model) if parent else None

    with jax.set_mesh(mesh):
        batches = sharding.batch_sharding(mesh)
        open_loader = partial(make_loader, config.data, processor, "train", seed=config.seed, sharding=batches)
        loader = open_loader()
        steps = config.steps or math.ceil(config.epochs * loader.batches_per_epoch)
        step = make_step(config, model, mesh, steps=steps, num_sources=len(sources))
        traced = profiling.parse_steps(profile, steps)
        checkpoint.claim(workdir, settings, lineage, processor)
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


def make_processor(config, model: FastVLM, parent: model_io.Loaded | None) -> Processor:
    """The processor of the run: the parent's tokenizer unless data.tokenizer names one, the config's template and size.

    Raises:
      ValueError: the tokenizer has more ids than the model.
    """
    data = config.data
    if data.tokenizer or parent is None or parent.processor is None:
        tokenizer = load_tokenizer(data.tokenizer or data_sets(data)[0][0])
    else:
        tokenizer = parent.processor.tokenizer
    if tokenizer.vocab_size > model.llm_args["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and model.llm.vocab_size is {model.llm_args['vocab_size']}; "
            f"set --config.model.llm.vocab_size={tokenizer.vocab_size}"
        )
    vision = fastvlm.make_encoder(**model.vision_args)
    sides = [side for side, _ in data.resolutions] or [data.image_size]
    if data.image_size not in sides:
        raise ValueError(f"data.resolutions {sides} leave out data.image_size={data.image_size}, the one of validation")
    try:
        multiple = getattr(vision, "stride", data.image_size)
        sizes = [make_sizes(side, data.aspects, multiple, model.tokens_per_image) for side in sides]
        square = model.tokens_per_image(data.image_size)
    except ValueError as error:
        raise ValueError(f"data.image_size={data.image_size}: {error}") from error
    return Processor(
        tokenizer,
        data.template,
        data.image_size,
        square,
        tuple(vision.image_mean),
        tuple(vision.image_std),
        data.fit,
        tuple(map(tuple, data.grids)),
        sum(sizes, ()) if data.aspects or data.resolutions else (),
    )


def flow_scalars(loader: Loader, seconds: float, mfu) -> dict[str, float]:
    """What went through in the last `seconds`: rates, the share of the time waited for input, records by data set."""
    flow = loader.flow()
    scalars = {
        "images/s": flow.images / seconds,
        "tokens/s": flow.tokens / seconds,
        "input_bound": min(flow.waited / seconds, 1.0),
        "substituted": loader.substituted,
        "truncated": flow.truncated,
    }
    if len(loader.names) > 1:
        scalars |= {f"records/{name}": count for name, count in zip(loader.names, flow.records, strict=True)}
    return scalars | mfu(flow, seconds)


# What may differ between a parent and a stage; a CLIP projection is dropped, a context length computes nothing.
FREE = (
    "form", "batch_norm", "drop_path", "remat", "init_std", "layer_scale_init", "head_features", "head_bias",
    "context_length", "parent", "name",
)  # fmt: skip


def adapt(parent: model_io.Loaded, model: FastVLM) -> dict[str, Any]:
    """The parent's variables in the form that this stage wants, arrays or Leaves; parts it lacks are left out.

    A branched encoder is folded for a folded stage, and a CLIP projection is dropped.

    Raises:
      ValueError: the parent is a model of another size, or is folded where the branched form is wanted.
    """
    there, config, variables = fastvlm.build(**parent.config), parent.config, parent.variables
    if there.vision_args is not None:
        theirs, ours = (fastvlm.make_encoder(**args) for args in (there.vision_args, model.vision_args))
        check_same("vision", theirs, ours)
        _, variables = without_head(config, variables)
        if isinstance(ours, FastViT) and theirs.form != ours.form:
            if theirs.form == "folded":
                raise ValueError(
                    "the parent's encoder is folded and cannot be unfolded: set --config.model.vision.form=folded"
                )
            variables = fold_variables(variables)
    if there.llm_args is not None:
        theirs, ours = (Decoder(**args) for args in (there.llm_args, model.llm_args))
        check_same("llm", *(llm.clone(head_dim=llm.size_of_head) for llm in (theirs, ours)))
    expected = model_io.abstract_variables(model)
    variables = {
        name: {part: tree for part, tree in variables.get(name, {}).items() if part in expected[name]}
        for name in expected
    }
    for name, parts in variables.items():
        for part, tree in parts.items():
            if jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, expected[name][part]):
                raise ValueError(
                    f"the parent's {part} has other {name} than this stage's: they must be of the same size"
                )
    return variables


def check_same(part: str, theirs: nn.Module, ours: nn.Module) -> None:
    """Raises ValueError, naming the attribute, where two modules are not of the same size."""
    kinds = type(theirs).__name__, type(ours).__name__
    if kinds[0] != kinds[1]:
        raise ValueError(f"parent has a {kinds[0]} for model.{part} and this stage a {kinds[1]}: choose the same kind")
    for field in dataclasses.fields(ours):
        x, y = (list(x) if isinstance(x, list | tuple) else x for x in (getattr(m, field.name) for m in (theirs, ours)))
        if field.name not in FREE and x != y:
            key = f"model.{part}.{field.name}"
            raise ValueError(f"parent has {key} {x!r} and this stage {y!r}: set --config.{key} or take another parent")


class Step(NamedTuple):
    """What the trainer runs, and what preflight compiles.

    Attributes:
      fn: jitted (state, batch) -> (state, metrics); the state is donated.
      make_state: (rng, variables or None) -> a state that is born sharded. `variables` may hold some parts of the model
        only; the others are initialized.
      abstract: the state as ShapeDtypeStructs with their shardings.
    """

    fn: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    make_state: Callable[[jax.Array, dict[str, Any] | None], TrainState]
    abstract: TrainState


def make_step(config, model: FastVLM, mesh: jax.sharding.Mesh, *, steps: int, num_sources: int = 1) -> Step:
    """The training step of a config on a mesh, which may be of abstract devices; call it inside `jax.set_mesh`.

    Args:
      steps: of the whole run, for the schedule.
      num_sources: data sets, for the loss of each.

    Raises:
      ValueError: groups that do not fit the parameters, or a mesh that does not divide one.
    """
    optimizer = optim.make_optimizer(
        model_io.abstract_variables(model)["params"],
        config.groups,
        steps=steps,
        warmup_ratio=config.warmup_ratio,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        clip_norm=config.clip_norm,
        moment_dtype=config.moment_dtype,
    )
    make_state, abstract = state_of(
        model, optimizer, config.groups, mesh, param_dtype=config.param_dtype, shard_frozen=config.shard_frozen
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    fn = partial(
        train_step,
        model=model,
        optimizer=optimizer,
        groups=config.groups,
        seed=config.seed,
        num_sources=num_sources,
        accumulate=config.accumulate,
        shardings=optim.split(shardings.params, config.groups)[0],
    )
    everywhere = jax.sharding.NamedSharding(mesh, sharding.spec(()))  # every process reads the metrics
    return Step(jax.jit(fn, donate_argnums=0, out_shardings=(shardings, everywhere)), make_state, abstract)


def abstract_batch(config, model: FastVLM, mesh: jax.sharding.Mesh) -> Batch:
    """The batch of a config at data.image_size, as ShapeDtypeStructs with their shardings."""
    data, side = config.data, config.data.image_size
    model.tokens_per_image(side)
    layout = sharding.batch_sharding(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((data.groups, *shape), dtype, sharding=layout)

    text = (data.rows_per_group, data.row_length)
    names = ("tokens", "image_index", "targets", "segment_ids", "positions", "source")
    return Batch(
        images=array(jnp.uint8, data.images_per_group, side, side, 3),
        image_mask=array(bool, data.images_per_group),
        loss_mask=array(bool, *text),
        **{name: array(jnp.int32, *text) for name in names},
    )


def state_of(
    model: FastVLM, optimizer, groups: optim.Groups, mesh, *, param_dtype: str = "float32", shard_frozen: bool = True
):
    """(make_state, abstract): see Step."""

    def build(params, batch_stats) -> TrainState:
        params = jax.tree.map(lambda x: x.astype(param_dtype), params)
        trainable, _ = optim.split(params, groups)
        # The slots are made from float32: Adam's second moment would not move in bfloat16.
        slots = optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), trainable))
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, slots)

    def fresh(rng) -> TrainState:
        variables = fastvlm.init_variables(model, rng)
        return build(variables["params"], variables.get("batch_stats", {}))

    variables = fastvlm.boxed_variables(model)
    boxed = jax.eval_shape(build, variables["params"], variables["batch_stats"])
    _, frozen = optim.split(nn.unbox(boxed.params), groups)
    whole = {} if shard_frozen else {f"params/{path}" for path in frozen}
    shardings = sharding.shardings_of(boxed, mesh, whole.__contains__)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)

    def make_state(rng, variables) -> TrainState:
        if variables is None:
            return jax.jit(lambda rng: nn.unbox(fresh(rng)), out_shardings=shardings)(rng)
        wanted = {"params": shardings.params, "batch_stats": shardings.batch_stats}
        dtypes = {"params": param_dtype, "batch_stats": "float32"}
        missing = {
            name: {p: s for p, s in tree.items() if p not in variables.get(name, {})} for name, tree in wanted.items()
        }

        def rest(rng):
            made = nn.unbox(fastvlm.init_variables(model, rng))
            return {name: {part: made[name][part] for part in parts} for name, parts in missing.items()}

        initialized = jax.jit(rest, out_shardings=missing)(rng) if any(missing.values()) else missing
        whole = {}
        for name, tree in wanted.items():
            given = {part: layouts for part, layouts in tree.items() if part not in missing[name]}
            place = partial(sharding.place, dtype=jnp.dtype(dtypes[name]))
            placed = jax.tree.map(place, {part: variables[name][part] for part in given}, given)
            whole[name] = {**initialized[name], **placed}
        return jax.jit(build, out_shardings=shardings)(whole["params"], whole["batch_stats"])

    return make_state, abstract


def make_validation(config, model: FastVLM, processor: Processor, batches):
    """A function from the state to {"validation/loss", "validation/accuracy"}, on the held-out split.

    The loss is over all data sets that have one, questions are asked of the first; without any there is no validation.
    """
    held_out = open_sources(config.data, "validation")
    everywhere = jax.sharding.NamedSharding(batches.mesh, sharding.spec(()))
    loss_fn = jax.jit(partial(eval_step, model=model), out_shardings=everywhere)

    def validate(state: TrainState) -> dict[str, float]:
        variables, scalars = {"params": state.params, "batch_stats": state.batch_stats}, {}
        if config.eval_batches and held_out:
            total = tokens = 0.0
            loader = eval_batches(
                config.data, processor, "validation", sharding=batches, num_batches=config.eval_batches
            )
            for batch in loader:
                loss, count = loss_fn(variables, batch)
                total, tokens = total + float(loss), tokens + float(count)
            loader.close()
            scalars["validation/loss"] = total / max(tokens, 1)
        if config.eval_questions and held_out:
            results = evaluate.answer_records(model, variables, processor, held_out[0], limit=config.eval_questions)
            scalars["validation/accuracy"] = evaluate.accuracy(results)
        return scalars

    return validate
