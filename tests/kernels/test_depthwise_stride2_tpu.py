"""Compares the TPU kernels of stride 2, run by Pallas on a CPU, with XLA's convolution, and compiles them for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_program import SLICES, gradient_program

from fastvlm_jax.kernels import depthwise_stride2_tpu, depthwise_tpu
from fastvlm_jax.kernels.depthwise import depthwise_conv

bf16 = jnp.bfloat16


def plain(x, kernel):
    """XLA's convolution of float32 values."""
    pad = [(len(kernel) // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x.astype(jnp.float32), kernel.astype(jnp.float32), (2, 2), pad, feature_group_count=x.shape[3],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def arrays(shape, k):
    B, H, W, C = shape
    keys = jax.random.split(jax.random.key(k), 3)
    kernel = jax.random.normal(keys[1], (k, k, 1, 2 * C)) / k
    return jax.random.normal(keys[0], shape, bf16), kernel, jax.random.normal(keys[2], (B, H // 2, W // 2, 2 * C), bf16)


def norm(x):
    return float(jnp.linalg.norm(x.astype(jnp.float32)))


# Two steps of rows, one at the top and one at the bottom; several images; some of 128 lanes, and two blocks.
@pytest.mark.parametrize(
    "shape, k",
    [
        ((2, 32, 32, 136), 3),
        ((1, 32, 64, 24), 7),
        pytest.param((3, 48, 32, 192), 5, marks=pytest.mark.full),
        pytest.param((2, 48, 64, 128), 7, marks=pytest.mark.full),
    ],
)
def test_results_and_gradients_are_those_of_the_convolution(monkeypatch, shape, k):
    monkeypatch.setattr(depthwise_tpu, "_VMEM", 0)  # 8 rows a step, as large maps have
    x, kernel, dy = arrays(shape, k)
    y, vjp = jax.vjp(plain, x.astype(jnp.float32), kernel)
    dx, dkernel = vjp(dy.astype(jnp.float32))
    found, found_vjp = jax.vjp(functools.partial(depthwise_conv, stride=2, kernels="interpret"), x, kernel)
    found_dx, found_dkernel = found_vjp(dy)
    assert found.dtype == found_dx.dtype == bf16 and found_dkernel.dtype == jnp.float32
    # Rounded once, to bfloat16.
    assert norm(found - y) <= 1.001 * norm(y.astype(bf16) - y)
    assert norm(found_dx - dx) <= 1.001 * norm(dx.astype(bf16) - dx)
    np.testing.assert_allclose(found_dkernel, dkernel, rtol=1e-5, atol=1e-5 * abs(dkernel).max())


def test_what_is_beyond_the_border_counts_for_nothing():
    """The rows that are read there are others of the image, which may hold anything."""
    x = jnp.zeros((1, 32, 32, 8), bf16).at[0, 14:18].set(jnp.inf)
    y = depthwise_stride2_tpu.forward(x, jnp.ones((3, 3, 1, 16)), interpret=True).astype(jnp.float32)
    assert not y[0, :7].any() and not y[0, 10:].any()


def test_what_does_not_fit():
    def fits(shape, k=7, outputs=None, dtype=bf16):
        kernel = jnp.zeros((*np.broadcast_to(k, 2), 1, outputs or 2 * shape[3]))
        return depthwise_stride2_tpu.fits(jnp.zeros(shape, dtype), kernel)

    assert fits((1, 16, 32, 4)) and fits((2, 256, 256, 96), 3) and fits((1, 48, 96, 1), 5)
    assert not fits((1, 24, 32, 4)) and not fits((1, 16, 48, 4)) and not fits((1, 16, 32, 4), outputs=4)
    assert not fits((1, 16, 32, 4), 9) and not fits((1, 16, 32, 4), (3, 7))
    assert not fits((1, 16, 32, 4), dtype=jnp.float32)


def compiled(name, shape, k):
    """The text of the program of a gradient of maps in bfloat16."""
    kernel = jax.ShapeDtypeStruct((k, k, 1, 2 * shape[3]), jnp.float32)
    return gradient_program(
        name, functools.partial(depthwise_conv, stride=2), jax.ShapeDtypeStruct(shape, bf16), kernel
    )


@pytest.mark.parametrize("name", SLICES)
def test_every_generation_takes_the_kernels_and_gathers_nothing(name):
    text = compiled(name, (8, 64, 64, 192), 7)
    assert "depthwise_7x7_stride2." in text and "depthwise_7x7_stride2_backward" in text
    # The gradient of the kernel is summed over the devices; no feature map moves.
    assert "all-gather" not in text and "all-to-all" not in text and text.count("all-reduce(") == 1


@pytest.mark.full
@pytest.mark.parametrize(
    "side, channels", [(512, 96), (256, 48), (256, 96), (128, 192), (64, 384), (32, 768), (32, 1536)]
)
@pytest.mark.parametrize("k", [3, 7])
def test_maps_of_the_tower_fit_in_memory(side, channels, k):
    assert "depthwise" in compiled("v5e:1x1", (1, side, side, channels), k)
