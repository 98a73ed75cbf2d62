"""Builds what a config names: the processor, the parent's weights adapted to this stage, the jitted step.

Training, data inspection, benchmarks and preflight all use this module.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from fastvlm_jax import config_checks, config_values, guard, losses, model_io, optim, pair_loss, sharding
from fastvlm_jax.adapt import adapt
from fastvlm_jax.batch import Batch, PairBatch
from fastvlm_jax.data.mixture import data_sets
from fastvlm_jax.images.sizes import make_sizes
from fastvlm_jax.loaded import Loaded
from fastvlm_jax.models import depth, fastvlm, kinds
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.models.lora import MERGED
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer
from fastvlm_jax.text.tokenizer import load_tokenizer
from fastvlm_jax.train_state import TrainState, state_of
from fastvlm_jax.train_step import train_step


class Stage(NamedTuple):
    """Holds what a stage needs for training.

    Attributes:
      model: the model of the config.
      processor: its tokenizer, template and image settings; a PairProcessor for stage 0.
      parent_variables: the parent's variables, adapted to `model`, as arrays or Leaves; None without a parent.
      parent_lineage: JSON values that say where the parent comes from; None without a parent.
      base: with adapters, those of the parent's arrays or Leaves that stay as they are, by path; checkpoints leave them
        out.
    """

    model: Model
    processor: Processor | PairProcessor
    parent_variables: dict[str, Any] | None
    parent_lineage: dict[str, Any] | None
    base: dict[str, Any]


def open_stage(config) -> Stage:
    """Builds the model of a config, reads its parent, and makes the processor that fits both.

    Raises:
      ValueError, FileNotFoundError: the parent does not fit (see adapt.adapt), the tokenizer does not (see
        `make_processor`), or the groups freeze an encoder whose BatchNorm statistics would still be updated.
    """
    parent = model_io.read(config.parent) if config.parent else None
    model = kinds.build(**config.model.to_dict())
    variables = adapt(parent, model, config.parent) if parent else None
    processor = make_processor(config, model, parent)
    trainable, frozen = optim.split(kinds.abstract_params(model, config_values.lora_of(config)), config.groups)
    if config.model.vision.get("batch_norm") == "train" and not any(path.startswith("vision/") for path in trainable):
        raise ValueError("groups freeze the encoder, but its statistics move: set model.vision.batch_norm to 'frozen'")
    given = flatten_dict((variables or {}).get("params", {}), sep="/")
    if adapts := config_values.lora_of(config) is not None:
        _check_base(config, trainable, frozen, given)
    base = {path: given[path] for path in frozen} if adapts else {}
    return Stage(model, processor, variables, parent and parent.lineage, base)


def _check_base(config, trainable: Collection[str], frozen: Collection[str], given: Collection[str]) -> None:
    """Raises ValueError unless adapters are trained on kernels that stay what the parent gives."""
    adapted = {optim.kernel_of(path) for path in (*trainable, *frozen) if path.startswith(optim.ADAPTERS)}
    groups = 'set groups to (("lora/.*", 2e-4, 0.0), (".*", 0.0, 0.0))'
    if learning := sorted(adapted & set(trainable)):
        raise ValueError(f"groups train {learning[0]}, to which lora gives an adapter: {groups}")
    if idle := [path for path in frozen if path.startswith(optim.ADAPTERS)]:
        raise ValueError(f"groups freeze the adapter {idle[0]}: {groups}")
    merged = sorted(path for path in adapted if path.startswith(MERGED))
    if config.lora.dropout and merged:
        raise ValueError(
            f"lora.dropout={config.lora.dropout} is not for {merged[0]}: set it to 0, or leave out its target"
        )
    if not config.parent:
        raise ValueError("lora adapts a trained model: name it with --config.parent=MODEL")
    if missing := [path for path in frozen if path not in given]:
        raise ValueError(
            f"lora keeps {missing[0]} as it is in the parent {config.parent}, which has none: name a whole model, or "
            "train it (a rate above 0 in groups)"
        )


def make_mesh(config, devices=None) -> jax.sharding.Mesh:
    """Returns the mesh of a config, over all devices by default.

    Raises:
      ValueError: the mesh does not fit the devices, or does not divide the batch or the heads.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    return mesh


def check_mesh(config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ValueError for a mesh that does not divide the batch of a config or the heads of its model."""
    if "text" in config.model and mesh.shape["tensor"] > 1:
        raise ValueError("mesh: the towers of stage 0 are not split along tensor: give that axis to data or fsdp")
    num_kv_heads = config.model.llm.num_kv_heads if "llm" in config.model else 1
    sharding.check_mesh(mesh, groups=config.data.groups, num_kv_heads=num_kv_heads, accumulate=config.accumulate)


def open_processor(config) -> Processor | PairProcessor:
    """Makes the processor of a config without its model's weights; reads the parent only for its tokenizer.

    Raises:
      ValueError, FileNotFoundError: settings contradict each other, the parent cannot be read, or as in
        `make_processor`.
    """
    config_checks.validate(config)
    parent = model_io.read(config.parent) if config.parent and not config.data.tokenizer else None
    return make_processor(config, kinds.build(**config.model.to_dict()), parent)


def make_processor(config, model: Model, parent: Loaded | None) -> Processor | PairProcessor:
    """Makes the processor of a stage from a tokenizer and the config's settings.

    The tokenizer is read from data.tokenizer or, if that is empty, from the parent, else from the first data folder.

    Raises:
      ValueError: the tokenizer has more ids than the model, or a size does not fit the encoder.
      FileNotFoundError: there is no tokenizer.
    """
    return (_conversations if isinstance(model, FastVLM) else _pairs)(config, model, parent)


def _pairs(config, model: CLIP, parent: Loaded | None) -> PairProcessor:
    data, given = config.data, parent.processor if parent is not None else None
    if data.tokenizer or not isinstance(given, PairProcessor):
        tokenizer = load_caption_tokenizer(data.tokenizer or data_sets(data)[0][0])
    else:
        tokenizer = given.tokenizer
    text, vision = model.text_args, fastvlm.make_encoder(**model.vision_args)
    if tokenizer.vocab_size > text["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and model.text.vocab_size is {text['vocab_size']}; "
            f"set --config.model.text.vocab_size={tokenizer.vocab_size}"
        )
    try:
        vision.grid(data.image_size, data.image_size)
    except ValueError as error:
        raise ValueError(f"data.image_size={data.image_size}: {error}") from error
    return PairProcessor(
        tokenizer,
        text["context_length"],
        data.image_size,
        tuple(vision.image_mean),
        tuple(vision.image_std),
        data.fit,
        data.transparency,
        tuple(width for width, _ in config.loss.teachers),
    )


def _conversations(config, model: FastVLM, parent: Loaded | None) -> Processor:
    data = config.data
    if data.tokenizer or parent is None or not isinstance(parent.processor, Processor):
        tokenizer, generation = load_tokenizer(data.tokenizer or data_sets(data)[0][0]), None
    else:
        tokenizer, generation = parent.processor.tokenizer, parent.processor.generation
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
        data.transparency,
        generation,
    )


class Step(NamedTuple):
    """Holds the training step that the trainer runs and preflight compiles.

    Attributes:
      fn: jitted (state, batch) -> (state, metrics); the state is donated.
      make_state: (rng, variables or None) -> a state, sharded from the start. `variables` may hold only some parts of
        the model; the others are initialized.
      abstract: the state as ShapeDtypeStructs with their shardings.
      optimizer: the optimizer in it.
      loss: what it minimises.
      rates: number of updates -> learning rates by their names in the log.
    """

    fn: Callable[[TrainState, Batch | PairBatch], tuple[TrainState, dict[str, jax.Array]]]
    make_state: Callable[[jax.Array, dict[str, Any] | None], TrainState]
    abstract: TrainState
    optimizer: optax.GradientTransformation
    loss: losses.Loss
    rates: Callable[[int], dict[str, float]]


def make_step(config, model: Model, mesh: jax.sharding.Mesh, *, steps: int, num_sources: int = 1) -> Step:
    """Makes the training step of a config on a mesh; call it inside `jax.set_mesh`.

    Args:
      mesh: mesh of devices, or of the abstract devices that preflight compiles for.
      steps: optimizer steps of the whole run, for the schedule.
      num_sources: number of data sets; with several, the loss of each is reported.

    Raises:
      ValueError: the groups do not fit the parameters, or the mesh does not divide a parameter.
    """
    params, course = kinds.abstract_params(model, config_values.lora_of(config)), config_values.course_of(config, steps)
    factors = depth.rate_factors(params, config.layer_decay)
    optimizer = optim.make_optimizer(
        params,
        config.groups,
        course,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        clip_norm=config.clip_norm,
        optimizer=config.optimizer,
        decayed=config.decayed,
        moment_dtype=config.moment_dtype,
        factors=factors,
    )
    rates = partial(optim.learning_rates, spans=optim.spans(params, config.groups, factors), course=course)
    make_state, abstract = state_of(
        model, optimizer, config.groups, mesh,
        param_dtype=config.param_dtype, frozen_dtype=config_values.frozen_dtype(config),
        shard_frozen=config.shard_frozen, average=config.ema > 0, adapters=config_values.lora_of(config),
    )  # fmt: skip
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    loss = make_loss(config, model, steps, num_sources)
    fn = partial(
        train_step,
        loss=loss,
        optimizer=optimizer,
        groups=config.groups,
        seed=config.seed,
        accumulate=config.accumulate,
        shardings=optim.split(shardings.params, config.groups)[0],
        rule=make_rule(config),
        ema=config.ema,
        adapters=config_values.lora_of(config),
    )
    # Metrics are whole on every device, so that every process can read them.
    everywhere = jax.sharding.NamedSharding(mesh, sharding.spec(()))
    fn = jax.jit(fn, donate_argnums=0, out_shardings=(shardings, everywhere))
    return Step(fn, make_state, abstract, optimizer, loss, rates)


def make_loss(config, model: Model, steps: int, num_sources: int = 1) -> losses.Loss:
    """Returns the loss that a config's steps minimise; see `make_step`."""
    if isinstance(model, FastVLM):
        return losses.next_token(model, num_sources)

    def logged(step: jax.Array) -> jax.Array:
        return ((step + 1) % config.log_every == 0) | (step + 1 == steps)

    return pair_loss.pairs(model, **config.loss.to_dict(), accumulate=config.accumulate, logged=logged)


def make_rule(config) -> guard.Rule | None:
    """Returns how the steps of a config are judged; None if they are not."""
    mode, factor = config.bad_steps.mode, config.bad_steps.factor
    return None if mode == "off" else guard.Rule(factor or math.inf, config.clip_norm, skip=mode == "on")


def abstract_batch(config, model: Model, mesh: jax.sharding.Mesh) -> Batch | PairBatch:
    """Returns a config's batch at data.image_size as ShapeDtypeStructs with their shardings."""
    data, side = config.data, config.data.image_size
    fastvlm.make_encoder(**model.vision_args).grid(side, side)
    layout = sharding.batch_sharding(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((data.groups, *shape), dtype, sharding=layout)

    if isinstance(model, CLIP):
        pairs, width = data.images_per_group, sum(width for width, _ in config.loss.teachers)
        taught = (array(jnp.float32, pairs, width), array(jnp.float32, pairs, data.texts, width)) if width else ()
        images = array(jnp.uint8, pairs, side, side, 3)
        return PairBatch(images, array(jnp.int32, pairs, data.texts, model.text_args["context_length"]), *taught)
    text = (data.rows_per_group, data.row_length)
    names = ("tokens", "image_index", "targets", "segment_ids", "positions", "source")
    return Batch(
        images=array(jnp.uint8, data.images_per_group, side, side, 3),
        image_mask=array(bool, data.images_per_group),
        loss_mask=array(bool, *text),
        **{name: array(jnp.int32, *text) for name in names},
    )
