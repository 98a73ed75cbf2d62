"""Compares the TPU kernels, run by Pallas on a CPU, with XLA's convolution, and compiles them for TPU slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_program import SLICES, gradient_program

from fastvlm_jax import sharding
from fastvlm_jax.kernels import depthwise_tpu
from fastvlm_jax.kernels.depthwise import depthwise_conv
from fastvlm_jax.kernels.stacked import Layer

bf16 = jnp.bfloat16


def plain(x, kernel):
    """XLA's convolution of float32 values."""
    return jax.lax.conv_general_dilated(
        x.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1), "SAME", feature_group_count=x.shape[3],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def arrays(shape, k):
    keys = jax.random.split(jax.random.key(k), 3)
    x, dy = (jax.random.normal(key, shape, bf16) for key in keys[:2])
    return x, jax.random.normal(keys[2], (k, k, 1, shape[3])) / k, dy


def norm(x):
    return float(jnp.linalg.norm(x.astype(jnp.float32)))


# Two steps of rows, of which one is at the top and one at the bottom; several images; 96 of 128 lanes, and two blocks.
@pytest.mark.parametrize(
    "shape, k",
    [
        ((2, 16, 32, 96), 3),
        ((1, 8, 16, 136), 7),
        pytest.param((3, 40, 16, 192), 3, marks=pytest.mark.full),
        pytest.param((2, 24, 32, 96), 7, marks=pytest.mark.full),
    ],
)
def test_results_and_gradients_are_those_of_the_convolution(monkeypatch, shape, k):
    monkeypatch.setattr(depthwise_tpu, "_VMEM", 0)  # 8 rows a step, as large maps have
    x, kernel, dy = arrays(shape, k)
    bias, plus = 3 * jax.random.normal(jax.random.key(4), shape[3:]), x[::-1]
    y, vjp = jax.vjp(lambda x, kernel: plain(x, kernel) + bias, x, kernel)
    _, dkernel = vjp(dy.astype(jnp.float32))
    layer = Layer(jnp.stack([jnp.full_like(x, jnp.nan), x]), 1)
    taps = depthwise_tpu.taps(kernel, bias)
    stack = depthwise_tpu.forward(layer, taps, layer._replace(at=0), interpret=True)
    found = stack[0]
    found_dx, dtaps = depthwise_tpu.backward(layer, taps, dy, plus, interpret=True)
    found_dkernel, dbias = depthwise_tpu.kernel_and_bias(dtaps.sum(0))
    np.testing.assert_array_equal(stack[1], x)
    assert found.dtype == found_dx.dtype == bf16 and found_dkernel.dtype == jnp.float32
    # Rounded once, to bfloat16.
    assert norm(found - y) <= 1.001 * norm(y.astype(bf16) - y)
    exact = jax.vjp(lambda x: plain(x, kernel), x.astype(jnp.float32))[1](dy.astype(jnp.float32))[0] + plus
    assert norm(found_dx - exact) <= 1.001 * norm(exact.astype(bf16) - exact)
    np.testing.assert_allclose(found_dkernel, dkernel, rtol=1e-5, atol=1e-5 * abs(dkernel).max())
    np.testing.assert_allclose(dbias, dy.astype(jnp.float32).sum((0, 1, 2)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_devices_add_up_the_gradient_of_the_kernel(stride):
    """Each of two devices has an image; alone, one has both."""
    x, kernel = arrays((2, 16, 32, 8), 3)[:2]
    kernel = jnp.repeat(kernel, stride, axis=3)  # stride 2 has two outputs a channel

    def gradients(x, kernel):
        def loss(x, kernel):
            y = depthwise_conv(x, kernel, stride=stride, kernels="interpret").astype(jnp.float32)
            return (y**2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)

    alone = gradients(x, kernel)
    mesh = sharding.make_mesh((1, 2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        together = gradients(jax.device_put(x, sharding.batch_sharding(mesh)), kernel)
    for one, two in zip(alone, together, strict=True):
        one, two = (np.asarray(a, np.float32) for a in (one, two))
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5 * abs(one).max())


def test_what_is_beyond_the_border_counts_for_nothing():
    """The rows that are read there are others of the image, which may hold anything."""
    x = jnp.zeros((1, 16, 16, 8), bf16).at[0, 7:9].set(jnp.inf)
    kernel = jnp.ones((3, 3, 1, 8))
    y = depthwise_tpu.forward(x, depthwise_tpu.taps(kernel), interpret=True).astype(jnp.float32)
    assert not jnp.isnan(y).any() and not y[0, :6].any() and not y[0, 10:].any()


def test_what_does_not_fit():
    def fits(shape, k=7, outputs=None, dtype=bf16):
        return depthwise_tpu.fits(jnp.zeros(shape, dtype), jnp.zeros((*np.broadcast_to(k, 2), 1, outputs or shape[3])))

    assert fits((1, 8, 16, 4)) and fits((2, 256, 256, 96), 3) and fits((1, 24, 48, 1), 5)
    assert not fits((1, 12, 16, 4)) and not fits((1, 8, 24, 4)) and not fits((1, 8, 16, 4), outputs=8)
    assert not fits((1, 8, 16, 4), 9) and not fits((1, 8, 16, 4), (3, 7)) and not fits((1, 8, 16, 4), dtype=jnp.float32)


def compiled(name, shape, k):
    """The text of the program of a gradient of maps in bfloat16."""
    kernel = jax.ShapeDtypeStruct((k, k, 1, shape[3]), jnp.float32)
    return gradient_program(name, depthwise_conv, jax.ShapeDtypeStruct(shape, bf16), kernel)


@pytest.mark.parametrize("name", SLICES)
def test_every_generation_takes_the_kernels_and_gathers_nothing(name):
    text = compiled(name, (8, 64, 64, 192), 7)
    assert "depthwise_7x7." in text and "depthwise_7x7_backward" in text
    # The gradient of the kernel is summed over the devices; no feature map moves.
    assert "all-gather" not in text and "all-to-all" not in text and text.count("all-reduce(") == 1


@pytest.mark.full
@pytest.mark.parametrize("side, channels", [(512, 96), (256, 96), (128, 192), (64, 384), (32, 768), (16, 1536)])
@pytest.mark.parametrize("k", [3, 7])
def test_maps_of_the_tower_fit_in_memory(side, channels, k):
    assert "depthwise" in compiled("v5e:1x1", (1, side, side, channels), k)
