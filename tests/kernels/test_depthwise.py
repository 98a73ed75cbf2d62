"""Depthwise convolution: every implementation against torch, and which one each platform gets."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fastvlm_jax.kernels import depthwise
from fastvlm_jax.kernels.depthwise import depthwise_conv

# (B, H, W, C), kernel size, stride, outputs per channel
CASES = [
    ((2, 8, 8, 4), 3, 1, 1),
    ((2, 12, 9, 4), 7, 1, 1),
    ((2, 7, 5, 4), 7, 2, 2),  # odd sizes
    ((2, 16, 16, 3), 7, 2, 2),
    ((2, 9, 10, 4), 3, 2, 1),
    ((2, 5, 4, 4), 1, 2, 1),
    ((2, 1, 9, 4), 7, 2, 1),
    ((2, 2, 2, 4), 7, 1, 1),  # a kernel larger than the map
    ((2, 3, 2, 4), 7, 2, 3),
    ((2, 1, 1, 4), 7, 1, 1),  # only the centre tap meets the map
    ((2, 1, 1, 4), 3, 1, 2),
    ((32, 8, 8, 4), 7, 1, 1),  # one matrix product per channel
    ((32, 7, 7, 4), 7, 2, 2),
    ((32, 4, 5, 4), 3, 1, 1),
    ((1, 19, 24, 72), 7, 1, 1),  # in blocks of rows, the last one not whole
    ((2, 21, 25, 64), 3, 2, 2),
    ((1, 3, 4, 2816), 7, 1, 1),  # two blocks, smaller than the kernel
]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_conv(x, kernel, dy, stride):
    """Returns torch's (y, dx, dkernel) in JAX's layout."""
    x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    kernel = torch.tensor(kernel).permute(3, 2, 0, 1).requires_grad_()
    y = torch.nn.functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2, groups=x.shape[1])
    y.backward(torch.tensor(dy).permute(0, 3, 1, 2))
    return [
        a.detach().permute(order).numpy()
        for a, order in [(y, (0, 2, 3, 1)), (x.grad, (0, 2, 3, 1)), (kernel.grad, (2, 3, 1, 0))]
    ]


@functools.partial(jax.jit, static_argnums=(0, 4))
def forward_and_backward(conv, x, kernel, dy, stride):
    y, vjp = jax.vjp(functools.partial(conv, stride=stride), x, kernel)
    return y, *vjp(dy)


def example(shape, k, stride, multiplier):
    batch, height, width, channels = shape
    x, kernel = normal(0, *shape), normal(1, k, k, 1, channels * multiplier)
    return x, kernel, normal(2, batch, -(-height // stride), -(-width // stride), channels * multiplier)


@pytest.mark.parametrize("shape, k, stride, multiplier", CASES)
def test_equals_torch_forward_and_backward(shape, k, stride, multiplier):
    arrays = example(shape, k, stride, multiplier)
    expected = torch_conv(*arrays, stride)
    for ours, theirs in zip(forward_and_backward(depthwise_conv, *arrays, stride), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [2, 6, 8, 11])
def test_the_convolution_that_tpu_gets_is_the_same_function(case, monkeypatch):
    monkeypatch.setattr(depthwise, "_cpu", depthwise._conv)
    monkeypatch.setattr(depthwise, "_cpu_vjp", depthwise._conv_vjp)
    shape, k, stride, multiplier = CASES[case]
    arrays = example(shape, k, stride, multiplier)

    def conv(x, kernel, stride):  # a separate function, so that jit does not reuse the program of the test above
        return depthwise_conv(x, kernel, stride=stride)

    assert "stablehlo.convolution" in forward_and_backward.lower(conv, *arrays, stride).as_text()
    for ours, theirs in zip(forward_and_backward(conv, *arrays, stride), torch_conv(*arrays, stride), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [2, 11])
def test_bfloat16_is_accumulated_in_float32(case):
    shape, k, stride, multiplier = CASES[case]
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in example(shape, k, stride, multiplier)]
    expected = torch_conv(*(np.asarray(a, np.float32) for a in arrays), stride)
    for ours, theirs in zip(forward_and_backward(depthwise_conv, *arrays, stride), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        # The tolerance allows a single rounding to 8 bits, at the end.
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=2**-8, atol=1e-4)


def test_gradients_keep_the_dtypes_of_a_bfloat16_map_and_a_float32_kernel():
    x, kernel, dy = example((2, 8, 8, 4), 3, 1, 1)
    y, dx, dkernel = jax.eval_shape(
        lambda x, kernel, dy: forward_and_backward(depthwise_conv, x, kernel, dy, 1),
        jnp.asarray(x, jnp.bfloat16),
        kernel,
        jnp.asarray(dy, jnp.bfloat16),
    )
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("shape, k", [((32, 16, 16, 4), 3), ((32, 8, 8, 4), 7)])
def test_each_platform_gets_its_form(shape, k):
    def loss(x, kernel):
        return depthwise_conv(x, kernel, stride=2).sum()

    x, kernel = jnp.zeros(shape), jnp.zeros((k, k, 1, 8))
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(x, kernel)
    assert "convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "convolution" not in traced.lower().compile().as_text()

    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        groups = [int(n) for n in re.findall(r"feature_group_count = (\d+)", text)]
        # Two outputs per channel are two convolutions, each with gradients of x and kernel.
        assert len(groups) == 6 and groups.count(4) >= 4
        assert "stablehlo.dot_general" not in text
        assert text.count("stablehlo.multiply") == 0


def test_sharding_the_batch_changes_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for shape, k, stride, multiplier in [((16, 12, 9, 4), 3, 2, 2), ((32, 4, 5, 4), 7, 1, 1)]:
        x, kernel, dy = example(shape, k, stride, multiplier)
        alone = forward_and_backward(depthwise_conv, x, kernel, dy, stride)
        x, dy = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, dy))
        kernel = jax.device_put(kernel, NamedSharding(mesh, P()))
        together = forward_and_backward(depthwise_conv, x, kernel, dy, stride)
        assert together[0].sharding.spec[0] == together[1].sharding.spec[0] == "data"
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
        text = forward_and_backward.lower(depthwise_conv, x, kernel, dy, stride).compile().as_text()
        assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


def test_works_under_scan_and_checkpoint():
    x, _, _ = example((2, 6, 6, 4), 3, 1, 1)
    kernels = 0.1 * normal(3, 3, 3, 3, 1, 4)

    def scanned(x, kernels):
        block = jax.checkpoint(lambda x, kernel: (x + depthwise_conv(x, kernel), None))
        return jnp.sum(jax.lax.scan(block, x, kernels)[0] ** 2)

    def unrolled(x, kernels):
        for kernel in kernels:
            x = x + depthwise_conv(x, kernel)
        return jnp.sum(x**2)

    gradients = [jax.jit(jax.grad(f, argnums=(0, 1)))(x, kernels) for f in (scanned, unrolled)]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "x, kernel, stride, message",
    [
        ((2, 8, 8, 4), (3, 3, 1, 6), 1, "6 output channels, not a multiple of the 4 channels of x"),
        ((2, 8, 8, 4), (4, 4, 1, 4), 1, "kernel size must be odd, got 4x4"),
        ((2, 8, 8, 4), (3, 3, 4, 4), 1, r"kernel must be \[k, k, 1, C\*m\], got shape \(3, 3, 4, 4\)"),
        ((8, 8, 4), (3, 3, 1, 4), 1, r"x must be \[B, H, W, C\], got shape \(8, 8, 4\)"),
        ((2, 8, 8, 4), (3, 3, 1, 4), 3, "stride must be 1 or 2, got 3"),
    ],
)
def test_a_mismatch_is_named(x, kernel, stride, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(jnp.zeros(x), jnp.zeros(kernel), stride=stride)
