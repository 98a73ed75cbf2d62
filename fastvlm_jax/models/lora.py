"""Adapts dense kernels by products of low rank (LoRA, arXiv 2106.09685): pure functions on trees of parameters.

    params["llm"]["layers"]["q"]["kernel"]            [L, I, O]                              frozen
    params["lora"]["llm"]["layers"]["q"]["kernel"]    {"a": [L, I, r], "b": [L, r, O]}       trained

A layer then computes x @ kernel + factor * (dropout(x) @ a) @ b. A model is called with the adapters in a collection of
their own, "lora", beside "params": see `variables_of`. A module whose kernel has an adapter finds it there.

Legend: I inputs and O outputs of a kernel, r rank, L layers of a stack.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fastvlm_jax.sharding import gathered

Array = jax.Array
NAME = "lora"  # of the subtree of the parameters, of the collection and of the random numbers
# Where adapters are added to the kernel itself, which leaves no input to drop numbers of.
MERGED = ("vision/", "llm/lm_head/")
MOST_RANK, MOST_ALPHA = 4096, 1e9


class Lora(NamedTuple):
    """Describes the adapters of a model.

    Attributes:
      rank: r.
      alpha: the factor is alpha / rank, or alpha / sqrt(rank) if it is stabilised.
      dropout: probability with which a number of the input is left out of the adapter's product in training.
      targets: regex of the paths of the kernels that get an adapter; it must match a whole path.
      stabilised: see `alpha` (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "llm/layers/(q|k|v|o|gate|up|down)/kernel"
    stabilised: bool = False

    @property
    def factor(self) -> float:
        return self.alpha / (self.rank**0.5 if self.stabilised else self.rank)


def problem(lora: Lora) -> str:
    """Returns which attribute is out of range, in a line; "" if none is."""
    if type(lora.rank) is not int or not 0 < lora.rank <= MOST_RANK:
        return f"rank={lora.rank!r} must be a whole number from 1 to {MOST_RANK}"
    if type(lora.alpha) not in (int, float) or not 0 < lora.alpha <= MOST_ALPHA:
        return f"alpha={lora.alpha!r} must be a positive number up to {MOST_ALPHA:g}"
    if type(lora.dropout) not in (int, float) or not 0 <= lora.dropout < 1:
        return f"dropout={lora.dropout!r} must be at least 0 and below 1"
    if type(lora.stabilised) is not bool:
        return f"stabilised={lora.stabilised!r} must be True or False"
    try:
        re.compile(lora.targets)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        return f"targets={lora.targets!r} is no regex: {error}"
    return ""


def paths_of(params: Any, targets: str) -> list[str]:
    """Returns the paths of the kernels that `targets` names, of dense layers and of 1x1 convolutions.

    Args:
      params: parameters without adapters, or their shapes, not boxed.

    Raises:
      ValueError: it names none.
    """
    flat = flatten_dict(params, sep="/")
    fitting = [path for path, x in flat.items() if _is_dense(path, x.shape)]
    found = [path for path in fitting if re.fullmatch(targets, path)]
    if not found:
        examples = ", ".join([*fitting[:2], *fitting[-2:]])
        raise ValueError(f"lora.targets={targets!r} matches no dense kernel; there are {examples}, for example")
    return found


def _is_dense(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter is a kernel of a matrix product: [I, O] or [1, 1, I, O], or a stack of them."""
    if not path.endswith("/kernel") or "/unused/" in path:
        return False
    return len(shape) < 4 or (shape[-4:-2] == (1, 1) and shape[-2] > 1)


def with_adapters(params: Any, lora: Lora | None, rng: Array) -> Any:
    """Returns parameters with fresh adapters under "lora"; those of a model without adapters as they are.

    As in PEFT, `a` is drawn from +-1/sqrt(I) and `b` is 0, so that the model computes what it did before. An adapter
    has the kernel's logical axes.

    Args:
      params: parameters, boxed with their logical axes or not.

    Raises:
      ValueError: see `paths_of`.
    """
    if lora is None:
        return params
    flat, adapters = flatten_dict(params, sep="/"), {}
    for number, path in enumerate(paths_of(nn.unbox(params), lora.targets)):
        kernel = flat[path]
        *lead, inputs, outputs = nn.unbox(kernel).shape
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(rng, number), (*lead, inputs, lora.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, lora.rank, outputs), jnp.float32)
        if isinstance(kernel, nn.LogicallyPartitioned):
            a = kernel.replace(value=a, names=(*kernel.names[:-1], None))
            b = kernel.replace(value=b, names=(*kernel.names[:-2], None, kernel.names[-1]))
        adapters |= {f"{path}/a": a, f"{path}/b": b}
    return {**params, NAME: unflatten_dict(adapters, sep="/")}


def variables_of(params: Any, batch_stats: Any, lora: Lora | None, *, train: bool = False) -> dict[str, Any]:
    """Returns the variables that a model is called with: adapters, times their factor, are a collection of their own.

    Args:
      params: parameters, with adapters under "lora" or without.
      lora: describes the adapters; None if there are none.
      train: whether numbers are dropped, if the adapters have dropout and the call has random numbers named "lora".
    """
    if lora is None:
        return {"params": params, "batch_stats": batch_stats}
    base = {name: tree for name, tree in params.items() if name != NAME}

    def called(adapter: dict[str, Array]) -> dict[str, Array]:
        a, b = adapter["a"], adapter["b"]
        kept = {"keep": jnp.full(a.shape[: a.ndim % 2], 1 - lora.dropout)} if train and lora.dropout else {}
        return {"a": a, "b": b * lora.factor, **kept}

    adapters = jax.tree.map(called, params[NAME], is_leaf=_is_adapter)
    return {"params": base, "batch_stats": batch_stats, NAME: adapters}


def _is_adapter(x: Any) -> bool:
    return isinstance(x, dict) and {"a", "b"} <= x.keys() <= {"a", "b", "keep"}


def update(module: nn.Module, x: Array, axes: tuple[str | None, str | None] = (None, None)) -> Array | None:
    """Returns what the adapter of a module's kernel adds to its output, [..., O]; None if it has none.

    Args:
      x: input of the module, [..., I].
      axes: logical axes of the kernel.
    """
    if not module.has_variable(NAME, "kernel"):
        return None
    adapter = module.get_variable(NAME, "kernel")
    if "keep" in adapter and module.has_rng(NAME):
        kept = jax.random.bernoulli(module.make_rng(NAME), adapter["keep"], x.shape)
        x = jnp.where(kept, x / adapter["keep"].astype(x.dtype), 0)
    a = gathered(adapter["a"], (axes[0], None), x.dtype)
    b = gathered(adapter["b"], (None, axes[1]), x.dtype)
    y = x.reshape(-1, x.shape[-1]) @ a @ b
    return y.reshape(*x.shape[:-1], y.shape[-1])


def adapted(module: nn.Module, kernel: Array) -> Array:
    """Returns the kernel of a module with its adapter added, in float32; without an adapter the kernel as it is."""
    return merged(kernel, module.get_variable(NAME, "kernel")) if module.has_variable(NAME, "kernel") else kernel


def merged(params: Any, adapters: Any) -> Any:
    """Returns parameters to which adapters are added.

    Args:
      params: a tree of arrays.
      adapters: a tree with adapters, as `variables_of` returns them, where kernels of `params` have some.
    """
    if _is_adapter(adapters):
        return params.astype(jnp.float32) + adapters["a"] @ adapters["b"]
    return {**params, **{name: merged(params[name], inner) for name, inner in adapters.items()}}
