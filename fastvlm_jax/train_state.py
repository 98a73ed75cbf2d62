"""Defines the state of training, and makes it sharded from the start."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fastvlm_jax import guard, optim, sharding
from fastvlm_jax.guard import Guard
from fastvlm_jax.models import kinds
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.models.lora import Lora, variables_of, with_adapters


@flax.struct.dataclass
class TrainState:
    """Holds everything that the next step depends on, except its batch."""

    step: jax.Array  # int32 []: steps done, those whose update was left out included
    params: Any  # nested dicts: vision/, projector/, llm/, with adapters lora/; in stage 0 vision/, text/, logit_scale
    batch_stats: Any  # BatchNorm statistics under vision/
    opt_state: Any  # optimizer slots of the trainable parameters only; its counts are of updates, not of steps
    guard: Guard  # what the next step is judged by
    # Moving averages in float32: {"params": those of the trainable parameters, by path, "batch_stats": ...}, or None.
    average: Any = None


def averaged(state: TrainState) -> dict[str, Any]:
    """Returns parameters and statistics of the model that a state stands for: the averages, if it keeps any."""
    if state.average is None:
        return {"params": state.params, "batch_stats": state.batch_stats}
    flat = flatten_dict(state.params, sep="/") | state.average["params"]
    return {"params": unflatten_dict(flat, sep="/"), "batch_stats": state.average["batch_stats"]}


def model_variables(state: TrainState, adapters: Lora | None) -> dict[str, Any]:
    """Returns the variables with which the model of a state is called, as in `averaged`."""
    return variables_of(**averaged(state), lora=adapters)


def state_of(
    model: Model,
    optimizer,
    groups: optim.Groups,
    mesh,
    *,
    param_dtype: str = "float32",
    frozen_dtype: str = "",
    shard_frozen: bool = True,
    average: bool = False,
    adapters: Lora | None = None,
):
    """Returns the functions and shapes `make_state` and `abstract` that stage.Step describes.

    Args:
      param_dtype: dtype of the parameters; optimizer slots and batch statistics are float32.
      frozen_dtype: dtype of frozen kernels and embeddings; "" is that of `param_dtype`.
      shard_frozen: whether frozen parameters are sharded along fsdp too.
      average: whether the state keeps moving averages.
      adapters: describes the adapters that the parameters get.
    """

    def init(rng) -> dict[str, Any]:
        variables = kinds.init_variables(model, rng)
        return {"batch_stats": {}, **variables, "params": with_adapters(variables["params"], adapters, rng)}

    boxed = jax.eval_shape(lambda: init(jax.random.key(0)))
    frozen = optim.split(nn.unbox(boxed["params"]), groups)[1]
    narrow = {path for path in frozen if path.endswith(("/kernel", "/embedding"))} if frozen_dtype else ()

    def dtype_of(path: str) -> jnp.dtype:
        return jnp.dtype(frozen_dtype if path in narrow else param_dtype)

    def build(params, batch_stats) -> TrainState:
        flat = flatten_dict(params, sep="/")
        params = unflatten_dict(
            {path: jax.tree.map(lambda x: x.astype(dtype_of(path)), x) for path, x in flat.items()}, sep="/"
        )
        trainable, _ = optim.split(params, groups)
        # Float32 parameters give float32 slots: Adam's second moment would not move in bfloat16.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
        kept = {"params": wide, "batch_stats": batch_stats} if average else None
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(wide), guard.begin(), kept)

    def fresh(rng) -> TrainState:
        variables = init(rng)
        return build(variables["params"], variables["batch_stats"])

    boxed = jax.eval_shape(build, boxed["params"], boxed["batch_stats"])
    whole = {"guard/norms"} | (set() if shard_frozen else {f"params/{path}" for path in frozen})
    shardings = sharding.shardings_of(boxed, mesh, whole.__contains__)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)

    def make_state(rng, variables) -> TrainState:
        if variables is None:
            return jax.jit(lambda rng: nn.unbox(fresh(rng)), out_shardings=shardings)(rng)
        wanted = {"params": shardings.params, "batch_stats": shardings.batch_stats}
        wanted, given = (flatten_dict(tree) for tree in (wanted, variables))
        missing = {path: layout for path, layout in wanted.items() if path not in given}

        def rest(rng):
            made = flatten_dict(nn.unbox(init(rng)))
            return {path: made[path] for path in missing}

        whole = jax.jit(rest, out_shardings=missing)(rng) if missing else {}
        for path, layout in wanted.items():
            if path not in missing:
                dtype = dtype_of("/".join(path[1:])) if path[0] == "params" else jnp.dtype(jnp.float32)
                whole[path] = sharding.place(given[path], layout, dtype=dtype)
        whole = unflatten_dict(whole)
        # On a CPU the arrays may be the caller's own memory; elsewhere two copies of a model need not fit.
        given_away = () if jax.default_backend() == "cpu" else (0, 1)
        make = jax.jit(build, out_shardings=shardings, donate_argnums=given_away)
        return make(whole["params"], whole.get("batch_stats", {}))

    return make_state, abstract
