"""Moments and weighted sums of maps: values and gradients against torch in float64, meshes, and the TPU compiler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpu_program import SLICES, gradient_program

from fastvlm_jax import sharding
from fastvlm_jax.kernels import batch_norm_tpu
from fastvlm_jax.kernels.batch_norm import moments, weighted_sum
from fastvlm_jax.models.blocks import Block

SHAPE = (3, 8, 16, 136)  # 128 positions in tiles of 16; a block of 128 lanes and 8 of the next


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two grid steps an image, of two turns of a loop each, as large maps have."""
    monkeypatch.setattr(batch_norm_tpu, "BLOCK", 64 * 136)
    monkeypatch.setattr(batch_norm_tpu, "CHUNK", 32 * 136)


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def double(x):
    return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def close(actual, expected, tolerance=1e-5):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize("kernels", ["none", "interpret"])
def test_moments_and_their_gradient_are_those_of_torch(kernels):
    x, gradients = 2 * normal(0, SHAPE) + 3, (normal(1, SHAPE[::3]), normal(2, SHAPE[::3]))
    found, vjp = jax.vjp(lambda x: moments(x, kernels), x)
    theirs = double(x)
    expected = torch.mean(theirs, (1, 2)), torch.var(theirs, (1, 2), correction=0)
    for actual, tensor in zip(found, expected, strict=True):
        close(actual, tensor)
    torch.autograd.backward(expected, [double(gradient) for gradient in gradients])
    close(vjp(gradients)[0], theirs.grad)


@pytest.mark.parametrize("kernels", ["none", "interpret"])
def test_a_large_mean_costs_the_variance_no_digits(kernels):
    """A difference of large squares would leave no digit of a variance of 1 beside a mean of 1,000."""
    x = normal(0, SHAPE) + 1_000
    np.testing.assert_allclose(moments(x, kernels)[1], np.var(np.asarray(x, np.float64), (1, 2)), rtol=1e-4)


@pytest.mark.parametrize("kernels", ["none", "interpret"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_a_weighted_sum_and_its_gradients_are_those_of_torch(kernels, dtype, tolerance):
    xs, dy = tuple(normal(seed, SHAPE, dtype) for seed in (0, 1)), normal(2, SHAPE, dtype)
    weights = [normal(seed, SHAPE[::3]) for seed in (3, 4, 5)]
    y, vjp = jax.vjp(lambda xs, *weights: weighted_sum(xs, tuple(weights[:2]), weights[2], kernels), xs, *weights)
    theirs, their_weights = [double(x) for x in xs], [double(weight) for weight in weights]
    first, second, shift = (weight[:, None, None] for weight in their_weights)
    expected = theirs[0] * first + theirs[1] * second + shift
    expected.backward(double(dy))
    dxs, *sums = vjp(dy)
    assert y.dtype == dxs[0].dtype == dtype
    for actual, tensor in zip((y, *dxs), (expected, *(x.grad for x in theirs)), strict=True):
        close(np.asarray(actual, np.float32), tensor, tolerance)
    for actual, weight in zip(sums, their_weights, strict=True):
        close(actual, weight.grad)  # sums are float32 for both dtypes


def training_block(kernels, x, dy, mask, images):
    """Returns the output, statistics and gradients of a RepMixer block with statistics of groups of images."""
    block = Block("repmixer", layer_scale_init=0.5, batch_stats=images, kernels=kernels)
    variables = block.clone(batch_stats=0).init(jax.random.key(0), x[:1], 0.0)

    def loss(params, x):
        y, updated = block.apply({**variables, "params": params}, x, 0.0, mask, mutable=["batch_stats"])
        return jnp.sum(y.astype(jnp.float32) * dy * mask[:, None, None, None]), (y, updated)

    gradients, found = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return *found, gradients


@pytest.mark.parametrize("images", [-1, 2])
def test_a_block_of_kernels_on_a_mesh_is_the_plain_block(images):
    x, dy = normal(0, (8, 4, 16, 32)), normal(1, (8, 4, 16, 32))  # too few rows for the depthwise kernels
    mask = jnp.arange(8) != 5
    run = jax.jit(training_block, static_argnums=(0, 4))
    expected = run("none", x, dy, mask, images)
    mesh = sharding.make_mesh((1, 2, 2, 1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, sharding.batch_sharding(mesh)) for a in (x, dy, mask)]
        found = run("interpret", *split, images)

    def check(path, actual, expected):
        scale = abs(np.asarray(expected)).max()
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * scale, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, jax.tree.map(np.asarray, found), expected)


def test_a_block_reads_its_input_once_for_the_statistics_of_three_branches():
    """Skip, 1x1 branch and norm scale x or leave it: its moments are theirs. The others: the 3x3 and the 7x7."""
    block = Block("repmixer", batch_stats=-1, kernels="interpret")
    x = jax.ShapeDtypeStruct((2, 8, 16, 32), jnp.bfloat16)
    variables = jax.eval_shape(block.clone(batch_stats=0).init, jax.random.key(0), x, 0.0)
    program = jax.make_jaxpr(functools.partial(block.apply, mutable=["batch_stats"]))(variables, x, 0.0)
    assert len(re.findall(r"jaxpr=moments\d*\b", str(program))) == 3


def test_what_does_not_fit():
    def fits(*shape, dtype=jnp.bfloat16):
        return batch_norm_tpu.fits(jax.ShapeDtypeStruct(shape, dtype))

    assert fits(1, 4, 16, 8) and fits(2, 256, 256, 96) and fits(1, 16, 16, 3072, dtype=jnp.float32)
    assert not fits(1, 8, 8, 32) and not fits(1, 1, 16, 32) and not fits(1, 8, 16, 32, dtype=jnp.float16)


@pytest.mark.parametrize("name", SLICES)
def test_every_generation_takes_the_kernels_and_moves_no_map(name):
    def normalised(x, scale):
        mean, var = (jnp.mean(value, axis=0) for value in moments(x))
        factor = jnp.broadcast_to(scale * jax.lax.rsqrt(var + 1e-5), (len(x), len(scale)))
        return weighted_sum((x,), (factor,), -mean * factor)

    x = jax.ShapeDtypeStruct((8, 64, 64, 192), jnp.bfloat16)
    text = gradient_program(name, normalised, x, jax.ShapeDtypeStruct((192,), jnp.float32))
    assert "moments" in text and "products" in text
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
