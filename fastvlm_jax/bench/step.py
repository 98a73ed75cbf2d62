"""Times a training step and its parts on this machine's devices: `fastvlm bench step`.

`whole` is the program that `fastvlm train` runs. A compiler fuses and overlaps its parts, so none can be cut out of it.
Each part is timed as a program of its own, on the parameters and the batch of the step, and all programs take turns:

    encoder forward     the encoder on all images of the batch
    encoder backward    its forward and backward pass, minus `encoder forward`; none if it is frozen
    language model      projector, decoder and loss, forward and backward, from given features, minus `loss`
    loss                product with the vocabulary and cross-entropy, forward and backward, from given hidden states
    optimizer           clipping, AdamW and the new parameters, from given gradients
    rest                whole - all of these: below 0 where one program saves work, above 0 for what no part has

With accumulate=N the parts of the gradient run on an N-th of the batch, as in the step, and count N times.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax import config_checks, optim, stage
from fastvlm_jax.batch import Batch, parts_of
from fastvlm_jax.bench import clock
from fastvlm_jax.chips import peak_flops
from fastvlm_jax.config_values import lora_of
from fastvlm_jax.kernels.cross_entropy import cross_entropy
from fastvlm_jax.models import fastvlm, flops, kinds
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.lora import NAME, variables_of
from fastvlm_jax.train_state import TrainState

STEPS = 10_000  # steps of the schedule: no program depends on it
PARTS = ("encoder forward", "encoder backward", "language model", "loss", "optimizer")


@dataclasses.dataclass
class Programs:
    """Holds the compiled programs and the state that they run on.

    Attributes:
      state: the state; "whole" and "optimizer" replace it.
      calls: function of each program, by name.
      compile_seconds: seconds that each took to trace and compile.
    """

    state: TrainState
    calls: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, name: str, function: Callable, *args) -> Callable:
        """Compiles `function(state, *args)` ahead, as `name`, and returns the program."""
        program, self.compile_seconds[name] = clock.compile_ahead(jax.jit(function), self.state, *args)
        self.calls[name] = lambda: program(self.state, *args)
        return program


def measure(
    config, *, runs: int, warmup: int, others: Callable[[FastVLM, Batch], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Times the step of a config with random weights, pixels and tokens; returns the figures, JSON-ready.

    Args:
      runs, warmup: runs of each program on the clock, and before it.
      others: (model, batch) -> name -> Other: steps of other implementations, which take turns with these.

    Raises:
      ValueError: the config contradicts itself, is of stage 0 or has no images, or its mesh does not fit the devices
        or divide the batch or the heads.
    """
    config_checks.validate(config)
    if "llm" not in config.model:
        raise ValueError("--config is of stage 0, whose parts are not timed here: `fastvlm train` tells step_seconds")
    if not config.data.images_per_group:
        raise ValueError("data.images_per_group=0: the encoder's parts need images, set 1 or more")
    mesh = stage.make_mesh(config)
    with jax.set_mesh(mesh):
        model = kinds.build(**config.model.to_dict())
        step = stage.make_step(config, model, mesh, steps=STEPS)
        batch = random_batch(config, model, mesh)
        whole, seconds = clock.compile_ahead(step.fn, step.abstract, batch)
        before = clock.resident()
        state = jax.block_until_ready(step.make_state(jax.random.key(config.seed), None))
        made = Programs(state, compile_seconds={"whole": seconds})
        _add_whole(made, whole, batch)
        memory = memory_of(config, made.state, whole)
        # Before the other programs need memory.
        during = clock.most_resident(lambda: clock.take_turns(made.calls, 0, max(warmup, 1)))
        peak = clock.peak_memory(mesh.devices.flat[0], [whole])
        _add_gradients(made, config, model, batch)
        _add_optimizer(made, config, step)
        theirs = others(model, batch) if others else {}
        calls = {**made.calls, **{name: other.call for name, other in theirs.items()}}
        times = clock.take_turns(calls, runs, warmup)
    found = figures(config, model, mesh, times)
    found["against"] = [
        {"name": name, "step": clock.spread(times[name]), "ratio": _ratio(times["whole"], times[name]), **other.facts}
        for name, other in theirs.items()
    ]
    return found | {
        **memory, "peak_bytes": peak[0], "peak_is": peak[1], "resident_bytes": {"before": before, "most": during},
        "compile_seconds": made.compile_seconds, "runs": runs, "warmup": warmup, "versions": clock.versions(),
    }  # fmt: skip


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return float(np.median(np.array(ours) / np.array(theirs)))


def random_batch(config, model: FastVLM, mesh: jax.sharding.Mesh) -> Batch:
    """Returns a batch of random pixels and tokens in which every slot holds an image and every token counts.

    A row is one segment; it begins with the image tokens of its group, as many as it can hold.
    """
    rng, abstract = np.random.default_rng(config.seed), stage.abstract_batch(config, model, mesh)
    features = config.data.images_per_group * model.tokens_per_image(config.data.image_size)
    shape, words = abstract.tokens.shape, config.model.llm.vocab_size
    positions = np.arange(shape[-1], dtype=np.int32)
    values = Batch(
        images=rng.integers(0, 256, abstract.images.shape, np.uint8),
        image_mask=np.ones(abstract.image_mask.shape, bool),
        tokens=rng.integers(0, words, shape, np.int32),
        targets=rng.integers(0, words, shape, np.int32),
        image_index=np.broadcast_to(np.where(positions < features, positions, -1), shape),
        loss_mask=np.ones(shape, bool),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(positions, shape),
        source=np.zeros(shape, np.int32),
    )
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, abstract)


def memory_of(config, state: TrainState, program: Any) -> dict[str, int]:
    """Returns the bytes on a device of the state, of all gradients, in float32, and of the compiled step."""

    def elements(x) -> int:
        return math.prod(x.sharding.shard_shape(x.shape))

    trainable = optim.split(state.params, config.groups)[0]
    return {
        "state_bytes": sum(elements(x) * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "gradient_bytes": 4 * sum(map(elements, trainable.values())),
        "program_bytes": clock.program_bytes(program),
    }


def _add_whole(made: Programs, program: Any, batch: Batch) -> None:
    """Adds the step that the trainer runs as "whole"."""

    def run():
        made.state, metrics = program(made.state, batch)
        return made.state, metrics

    made.calls["whole"] = run


def _add_gradients(made: Programs, config, model: FastVLM, batch: Batch) -> None:
    """Compiles the programs of encoder, language model and loss, on what the step takes of the batch at a time."""
    own = jax.jit(lambda batch: jax.tree.map(lambda x: parts_of(x, config.accumulate)[0], batch))(batch)
    learns = any(map(_of_encoder, optim.split(made.state.params, config.groups)[0]))
    encode = encoder(config, model)
    features = made.add("encoder forward", encode, own)(made.state, own)
    if learns:
        made.add("encoder both", encoder_gradient(config, encode), own, features)
    made.add("language model and loss", language_model_gradient(config, model, learns), own, features)
    shape, layout = (*own.tokens.shape, config.model.llm.width), own.tokens.sharding
    hidden = jax.random.normal(jax.random.key(1), shape, jnp.dtype(model.dtype), out_sharding=layout)
    made.add("loss", loss_gradient(config), own, hidden)


def _of_encoder(path: str) -> bool:
    """Returns whether a parameter, or the kernel of an adapter, is the encoder's."""
    return optim.kernel_of(path).startswith("vision/")


def encoder(config, model: FastVLM) -> Callable:
    """Returns (state, batch) -> the encoder's features [G, N * L, C], as a training step computes them."""
    alone = fastvlm.build(vision=config.model.vision.to_dict(), dtype=model.dtype)
    rngs = {"drop_path": jax.random.key(0)} if config.model.vision.get("drop_path") else None

    def encode(state: TrainState, batch: Batch):
        variables = variables_of(state.params, state.batch_stats, lora_of(config), train=True)
        variables = {name: {part: tree[part] for part in tree if part == "vision"} for name, tree in variables.items()}
        how = {"train": True, "mutable": ["batch_stats"], "rngs": rngs, "method": "encode"}
        return alone.apply(variables, batch.images, batch.image_mask, **how)[0]

    return encode


def encoder_gradient(config, encode: Callable) -> Callable:
    """Returns (state, batch, gradient of the features) -> gradients of the encoder's trainable parameters."""

    def gradient(state: TrainState, batch: Batch, cotangent):
        trainable, frozen = optim.split(state.params, config.groups)
        own = {path: x for path, x in trainable.items() if _of_encoder(path)}

        def features(own):
            return encode(state.replace(params=optim.merge({**trainable, **own}, frozen)), batch)

        return jax.vjp(features, own)[1](cotangent)

    return gradient


def language_model_gradient(config, model: FastVLM, to_features: bool) -> Callable:
    """Returns (state, batch, features) -> gradients of projector, decoder and, with `to_features`, the features."""

    def losses(module, features, batch: Batch):
        text = (batch.tokens, batch.image_index, batch.positions, batch.segment_ids)
        return module.decode(module.projector(features), *text, batch.targets)

    def gradient(state: TrainState, batch: Batch, features):
        trainable, frozen = optim.split(state.params, config.groups)
        own = {path: x for path, x in trainable.items() if not _of_encoder(path)}
        rngs = {NAME: jax.random.key(0)}

        def value(own, features):
            params = optim.merge({**trainable, **own}, frozen)
            variables = variables_of(params, {}, lora_of(config), train=True)
            return jnp.mean(model.apply(variables, features, batch, method=losses, rngs=rngs))

        return jax.grad(value, argnums=(0, 1) if to_features else 0)(own, features)

    return gradient


def loss_gradient(config) -> Callable:
    """Returns (state, batch, hidden [G, R, T, D]) -> gradients of hidden states and, if it is trained, of the table."""

    def gradient(state: TrainState, batch: Batch, hidden):
        tied = config.model.llm.tie_embeddings
        name = "llm/embedding" if tied else "llm/lm_head/kernel"
        trainable, frozen = optim.split(state.params, config.groups)

        def value(hidden, table):
            rows = hidden.reshape(-1, *hidden.shape[2:]), batch.targets.reshape(-1, batch.targets.shape[-1])
            return jnp.mean(cross_entropy(rows[0], table if tied else table.T, rows[1]))

        learns = any(optim.kernel_of(path).startswith(name) for path in trainable)
        argnums = (0, 1) if learns else 0
        return jax.grad(value, argnums)(hidden, {**trainable, **frozen}[name])

    return gradient


def _add_optimizer(made: Programs, config, step: stage.Step) -> None:
    """Compiles the update of the parameters by given gradients and adds it as "optimizer"."""
    layouts = jax.tree.map(lambda x: x.sharding, step.abstract)
    learning = optim.split(made.state.params, config.groups)[0]
    shardings = optim.split(layouts.params, config.groups)[0]
    ones = jax.jit(lambda: {path: jnp.ones(x.shape) for path, x in learning.items()}, out_shardings=shardings)()

    def update(params, slots, gradients):
        trainable, frozen = optim.split(params, config.groups)
        trainable, slots = optim.update(step.optimizer, gradients, slots, trainable)
        return optim.merge(trainable, frozen), slots

    fn = jax.jit(update, donate_argnums=(0, 1), out_shardings=(layouts.params, layouts.opt_state))
    program, seconds = clock.compile_ahead(fn, made.state.params, made.state.opt_state, ones)

    def run():
        params, slots = program(made.state.params, made.state.opt_state, ones)
        made.state = made.state.replace(params=params, opt_state=slots)
        return params, slots

    made.calls["optimizer"], made.compile_seconds["optimizer"] = run, seconds


def figures(config, model: FastVLM, mesh: jax.sharding.Mesh, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Returns parts, rates and MFU from the seconds of the programs' runs; "mfu" is None where no peak is known."""
    data, devices = config.data, list(mesh.devices.flat)
    images, rows = data.groups * data.images_per_group, data.groups * data.rows_per_group
    trainable, frozen = optim.split(kinds.abstract_params(model, lora_of(config)), config.groups)
    counts = collections.Counter()
    for path, leaf in {**trainable, **frozen}.items():
        counts[path.partition("/")[0]] += math.prod(leaf.shape)
    work = work_of(model, trainable, images, data.image_size, rows, data.row_length)
    peak = peak_flops(devices)
    seconds = parts(times, config.accumulate)
    whole = clock.spread(times["whole"])

    def mfu(flop: float | None, time: float) -> float | None:
        return flop / time / peak if peak and flop and time > 0 else None

    return {
        "measured": True,
        "stage_name": config.stage,
        "device": clock.device_name(devices[0]),
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "dtype": config.model.dtype,
        "param_dtype": config.param_dtype,
        "remat": {part: config.model[part].get("remat", "none") for part in ("vision", "llm")},
        "batch": {
            "groups": data.groups, "images": images, "image_size": data.image_size, "rows": rows,
            "row_length": data.row_length, "accumulate": config.accumulate,
        },
        "parameters": {**counts, "trainable": sum(math.prod(x.shape) for x in trainable.values())},
        "step": whole,
        "parts": {
            name: {**clock.spread(runs), "flops": work.get(name), "mfu": mfu(work.get(name), np.median(runs))}
            for name, runs in seconds.items()
        },
        "images/s": images / whole["median"],
        "tokens/s": rows * data.row_length / whole["median"],
        "flops": sum(work.values()),
        "peak_flops": peak,
        "mfu": mfu(sum(work.values()), whole["median"]),
    }  # fmt: skip


def parts(times: Mapping[str, list[float]], accumulate: int) -> dict[str, list[float]]:
    """Returns the seconds of each part in each turn from those of the programs; see the head of this file."""
    turns = {name: np.array(seconds) for name, seconds in times.items()}
    forward, loss = turns["encoder forward"], turns["loss"]
    found = {"encoder forward": accumulate * forward}
    if "encoder both" in turns:
        found["encoder backward"] = accumulate * (turns["encoder both"] - forward)
    found["language model"] = accumulate * (turns["language model and loss"] - loss)
    found["loss"] = accumulate * loss
    found["optimizer"] = turns["optimizer"]
    found["rest"] = turns["whole"] - sum(found.values())
    return {name: seconds.tolist() for name, seconds in found.items()}


def work_of(model: FastVLM, trainable, images: int, side: int, rows: int, row_length: int) -> dict[str, float]:
    """Returns the model FLOPs of a step by part; those of the optimizer are not counted (models/flops.py)."""
    sizes = (images, side, side, rows, row_length)
    forward, step = flops.forward_flops(model, *sizes), flops.train_flops(model, trainable, *sizes)
    found = {
        "encoder forward": forward["vision"],
        "encoder backward": step["vision"] - forward["vision"],
        "language model": step["projector"] + step["llm"],
        "loss": step["loss"],
    }
    return {name: flop for name, flop in found.items() if flop}
