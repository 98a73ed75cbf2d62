"""Compares a stage with statistics of images with its blocks in plain JAX, and compiles it for TPU slices."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_program import SLICES, gradient_program

from fastvlm_jax import sharding
from fastvlm_jax.kernels import training_stage
from fastvlm_jax.models.blocks import Block
from fastvlm_jax.models.stage_weights import new_statistics, training_weights

bf16, f32 = jnp.bfloat16, jnp.float32
L, C = 2, 96


def blocks(images):
    """Returns the plain blocks as the tower runs them, and their variables, with other values than they start with."""
    scanned = nn.scan(
        lambda block, x, mask: (block(x, 0.0, mask), None),
        variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=L,
    )  # fmt: skip

    class Stage(nn.Module):
        batch_stats: int = images

        @nn.compact
        def __call__(self, x, mask):
            block = Block("repmixer", layer_scale_init=0.5, batch_stats=self.batch_stats, kernels="none", name="stage")
            return scanned(block, x, mask)[0]

    variables = Stage(0).init(jax.random.key(0), jnp.zeros((1, 8, 16, C)), None)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [a + 0.1 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    return Stage(), variables | {"params": jax.tree.unflatten(tree, moved)}


def plain(stage, variables, dtype, x, mask):
    y, updated = stage.apply(variables, x.astype(dtype), mask, mutable=["batch_stats"])
    return y, updated["batch_stats"]["stage"]


def kernels(variables, keep, images, x, mask):
    weights = training_weights(variables["params"]["stage"], bf16)
    x, *found = training_stage.stage(x, *weights, mask.astype(f32), images, keep, True)
    return x, new_statistics(variables["batch_stats"]["stage"], *found, 0.1)


def results(function, params, x, mask, dy):
    """Returns the output and the gradients by path, and the statistics, of what function(params, x, mask) gives."""
    y, vjp, stats = jax.vjp(lambda *args: function(*args, mask), params, x, has_aux=True)
    dparams, dx = vjp(dy.astype(y.dtype))
    return {"y": y, "dx": dx} | {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(dparams)}, stats


def error(found, exact):
    return float(jnp.linalg.norm(jnp.asarray(found, f32) - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize(
    "images, keep, mesh",
    [(4, ("depthwise",), (1, 2, 1, 1)), pytest.param(2, (), (1, 2, 1, 1), marks=pytest.mark.full)],
)
def test_errors_are_no_larger_than_those_of_xla_in_bfloat16(images, keep, mesh):
    """Images 0 to 3 with 2 left out, over two devices: their statistics are taken together, or are those of pairs."""
    x, dy = (jax.random.normal(jax.random.key(i), (4, 8, 16, C), bf16) for i in (2, 3))
    mask = jnp.array([True, True, False, True])
    dy = dy * mask[:, None, None, None]
    stage, variables = blocks(images)

    def of(function):
        wrapped = lambda params, x, mask: function(variables | {"params": params}, x=x, mask=mask)  # noqa: E731
        return jax.jit(partial(results, wrapped))

    exact, exact_stats = of(partial(plain, stage, dtype=f32))(variables["params"], x, mask, dy)
    rounded, _ = of(partial(plain, stage, dtype=bf16))(variables["params"], x, mask, dy)
    devices = sharding.make_mesh(mesh, jax.devices()[: np.prod(mesh)])
    with jax.set_mesh(devices):
        split = [jax.device_put(a, sharding.batch_sharding(devices)) for a in (x, mask, dy)]
        found, stats = of(partial(kernels, keep=keep, images=images))(variables["params"], *split)
    found, stats = jax.tree.map(np.asarray, (found, stats))
    assert found["y"].dtype == found["dx"].dtype == bf16
    # A kernel before its BatchNorm has no gradient but what the epsilon leaves: rounding is all of it.
    names = [name for name in exact if not name.endswith("['mixer']['scale']['kernel']")]
    ratios = {name: error(found[name], exact[name]) / error(rounded[name], exact[name]) for name in names}
    assert np.median([*ratios.values()]) <= 1.1 and max(ratios.values()) <= 2, ratios
    assert ratios["y"] <= 1.1 and ratios["dx"] <= 1.1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0.02, atol=0.003), stats, exact_stats)


def shaped(kind, *shape):
    return jax.ShapeDtypeStruct(shape, kind)


@pytest.mark.parametrize("name", SLICES)
def test_no_map_is_sent_and_no_stack_is_copied(name):
    _, variables = blocks(-1)
    params = jax.tree.map(
        lambda a: shaped(a.dtype, 3, *(4 * n if n in (C, 4 * C) else n for n in a.shape[1:])),
        variables["params"]["stage"],
    )

    def stage(x, params):
        weights = training_weights(params, bf16)
        return training_stage.stage(x, *weights, jnp.ones(len(x)), len(x), ("depthwise",))[0]

    # Maps of 128 x 128: a v5p prefetches whole stacks of smaller ones into on-chip memory.
    text = gradient_program(name, stage, shaped(bf16, 8, 128, 128, 4 * C), params)
    assert not re.search(r"bf16\[\S* all-(gather|to-all)", text)
    # What gives a stack of maps: kernels, which are custom calls, and what moves nothing.
    made = re.findall(r"= bf16\[[34],\d,128,128,384\]\S* ([\w-]+)\(", text)
    assert set(made) == {"custom-call", "get-tuple-element", "bitcast", "parameter"}
