"""Compares a stage as one function with its blocks in plain JAX, and compiles it for TPU slices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_program import SLICES, gradient_program

from fastvlm_jax import sharding
from fastvlm_jax.kernels import mlp, repmixer_stage, stacked
from fastvlm_jax.kernels.repmixer_stage import Weights
from fastvlm_jax.kernels.stacked import Layer

bf16, f32 = jnp.bfloat16, jnp.float32


def shapes(L, C):
    F = 4 * C
    return Weights((L, 3, 3, 1, C), (L, C), (L, 7, 7, 1, C), (L, C), (L, C, F), (L, F), (L, F, C), (L, C))


def random_weights(L, C):
    scales = Weights(0.3, 1, 0.15, 1, 0.1, 1, 0.05, 1)
    keys = jax.random.split(jax.random.key(0), len(scales))
    kinds = [f32] * 4 + [bf16] * 4
    arrays = map(jax.random.normal, keys, shapes(L, C))
    return Weights(*[(a * s).astype(kind) for a, s, kind in zip(arrays, scales, kinds, strict=True)])


def conv(x, kernel, bias):
    return bias + jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", feature_group_count=x.shape[3], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain(dtype, x, weights):
    """The blocks with XLA's convolutions and products in a dtype."""
    x = x.astype(dtype)
    for layer in range(len(weights.mixer)):
        w = Weights(*[a[layer].astype(dtype) for a in weights])
        y = conv(x, w.mixer, w.mixer_bias)
        x = mlp.plain(conv(y, w.conv, w.conv_bias), w.kernel1, w.bias1, w.kernel2, w.bias2, y)
    return x


def error(found, exact):
    return float(jnp.linalg.norm(found.astype(f32) - exact) / jnp.linalg.norm(exact))


def result_and_gradients(function, x, weights, dy):
    y, vjp = jax.vjp(function, x, weights)
    return [y, *jax.tree.leaves(vjp(dy.astype(y.dtype)))]


@pytest.mark.parametrize(
    "keep",
    [
        ("depthwise",),
        pytest.param((), marks=pytest.mark.full),
        pytest.param(("mixed", "depthwise"), marks=pytest.mark.full),
    ],
)
def test_errors_are_no_larger_than_those_of_xla_in_bfloat16(keep):
    L, shape = 2, (2, 16, 16, 96)
    x, dy = (jax.random.normal(jax.random.key(i), shape, bf16) for i in (1, 2))
    weights = random_weights(L, shape[3])
    stage = lambda x, w: repmixer_stage.stage(x, w, keep, True)  # noqa: E731
    mesh = sharding.make_mesh((1, 2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):  # an image each: the gradients of the weights are sums over both
        split = [jax.device_put(a, sharding.batch_sharding(mesh)) for a in (x, dy)]
        found = jax.jit(functools.partial(result_and_gradients, stage))(split[0], weights, split[1])
    found = [jnp.asarray(np.asarray(a)) for a in found]
    exact, rounded = (
        jax.jit(functools.partial(result_and_gradients, functools.partial(plain, dtype)))(x, weights, dy)
        for dtype in (f32, bf16)
    )
    assert found[0].dtype == bf16 and [a.dtype for a in found[2:]] == [a.dtype for a in weights]
    for one, two, three in zip(found, rounded, exact, strict=True):
        assert error(one, three) <= 1.1 * error(two, three)


def test_a_layer_is_written_in_its_place():
    stack = jnp.arange(48.0).reshape(3, 2, 8)
    new = stacked.write(-stack[0], Layer(stack, jnp.int32(1)), True)
    np.testing.assert_array_equal(new, stack.at[1].set(-stack[0]))


def compiled(name, shape, L=3):
    """The text of the program of a gradient."""
    kinds = [f32] * 4 + [bf16] * 4
    weights = Weights(*map(jax.ShapeDtypeStruct, shapes(L, shape[3]), kinds))
    stage = functools.partial(repmixer_stage.stage, keep=("depthwise",))
    return gradient_program(name, stage, jax.ShapeDtypeStruct(shape, bf16), weights)


@pytest.mark.parametrize("name", SLICES)
def test_no_map_is_sent_and_no_stack_is_copied(name):
    text = compiled(name, (8, 64, 64, 384))
    assert "all-gather" not in text and "all-to-all" not in text
    # What gives a stack of three maps: kernels, which are custom calls, and what moves nothing.
    made = re.findall(r"= bf16\[3,\d,64,64,384\]\S* ([\w-]+)\(", text)
    assert set(made) == {"custom-call", "get-tuple-element", "bitcast"}
