"""The pointwise-block kernels: values and gradients against torch in float64, GELU, meshes, and the TPU compiler."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpu_program import OTHERS, gradient_program

from fastvlm_jax.kernels import mlp, pointwise_block_tpu
from fastvlm_jax.kernels.gelu import value_and_slope
from fastvlm_jax.preflight import topology
from fastvlm_jax.sharding import make_mesh


def example(positions, channels, dtype=np.float32):
    """Returns y, kernel1, bias1, kernel2, bias2, skip and the gradient of the result, of usual sizes."""
    rng, hidden = np.random.default_rng(0), 4 * channels
    sizes = [(positions, channels), (channels, hidden), (hidden,), (hidden, channels), (channels,)]
    scales = [1, channels**-0.5, 1, hidden**-0.5, 1, 1, 1]
    return [
        jnp.asarray(scale * rng.standard_normal(size), dtype)
        for size, scale in zip([*sizes, sizes[0], sizes[0]], scales, strict=True)
    ]


def torch_block(*arrays):
    """Returns torch's (y, gradients of all arguments) in float64."""
    *args, dout = (torch.tensor(np.asarray(a, np.float64)) for a in arrays)
    y, kernel1, bias1, kernel2, bias2, *skip = (a.requires_grad_() for a in args)
    out = torch.nn.functional.gelu(y @ kernel1 + bias1) @ kernel2 + bias2 + sum(skip)
    out.backward(dout)
    return [out.detach().numpy(), *(a.grad.numpy() for a in args)]


def error(got, expected):
    """Returns the norm of the error, as a share of the norm of what is expected."""
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


def kernels(*arrays, exact, cores=1):
    """Returns (y, gradients of all arguments but the skip)."""
    y, kernel1, bias1, kernel2, bias2, *skip, dout = arrays
    row1, row2 = map(pointwise_block_tpu.row, (bias1, bias2))
    out = pointwise_block_tpu.forward(y, kernel1, row1, kernel2, row2, *skip, exact=exact, interpret=True)
    weights = kernel1, row1, kernel2.T, kernel1.T
    dy, sums = pointwise_block_tpu.backward(y, *weights, dout, exact=exact, cores=cores, interpret=True)
    return out, dy, *pointwise_block_tpu.gradients(sums)


@pytest.mark.parametrize("exact, tolerance", [(True, 1e-6), (False, 1e-4)])
@pytest.mark.parametrize("positions, channels", [(600, 96), (512, 192), (40, 40)])  # 600: the last block is not whole
def test_float32_equals_torch_forward_and_backward(positions, channels, exact, tolerance):
    arrays = example(positions, channels)
    for got, expected in zip(kernels(*arrays, exact=exact, cores=2), torch_block(*arrays)[:6], strict=True):
        assert got.shape == expected.shape
        assert error(got, expected) < tolerance


def test_without_a_skip_and_for_other_numbers_of_outputs():
    y, kernel1, bias1, kernel2, bias2, _, dout = example(48, 16)
    arrays = [y, kernel1, bias1, kernel2[:, :8], bias2[:8], dout[:, :8]]
    for ours, theirs in zip(kernels(*arrays, exact=True), torch_block(*arrays), strict=True):
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_bfloat16_is_no_further_from_float64_than_xla(exact):
    *args, dout = example(600, 96, jnp.bfloat16)
    expected = torch_block(*args, dout)[:6]
    y, vjp = jax.vjp(mlp.plain, *args)
    got = kernels(*args, dout, exact=exact)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 2 + [jnp.float32] * 4
    for ours, xla, exactly in zip(got, (y, *vjp(dout)), expected, strict=False):
        assert error(ours.astype(jnp.bfloat16), exactly) <= 1.1 * error(xla, exactly)


def test_sums_over_several_blocks_with_one_and_two_cores_agree():
    arrays = example(3 * 256 + 8, 16)  # four blocks, two a core
    one, two = (kernels(*arrays, exact=True, cores=cores) for cores in (1, 2))
    for a, b, expected in zip(one, two, torch_block(*arrays), strict=False):
        assert error(a, expected) < 1e-6 and error(b, expected) < 1e-6


@pytest.mark.parametrize("exact, value_error, slope_error", [(True, 7e-7, 2e-7), (False, 2.6e-5, 5.1e-5)])
def test_gelu_of_every_bfloat16(exact, value_error, slope_error):
    x = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    x = x[np.isfinite(x)].astype(np.float32)
    share = np.array([math.erfc(-v / 2**0.5) / 2 for v in x.astype(np.float64)])
    value = x * share
    slope = share + x * np.exp(-np.square(x.astype(np.float64)) / 2) / math.sqrt(2 * math.pi)
    got = [np.asarray(a) for a in value_and_slope(jnp.asarray(x), exact)]
    assert np.max(np.abs(got[0] - value)) < value_error
    assert np.max(np.abs(got[1] - slope)) < slope_error
    # Rounded to bfloat16: the distance from the rounded exact value, in units of the last place.
    large = np.abs(value) >= 0.01
    rounded, exactly = (a[large].astype(jnp.bfloat16).view(np.int16).astype(int) for a in (got[0], value.astype("f4")))
    assert np.max(np.abs(rounded - exactly)) <= (0 if exact else 1)
    assert np.mean(rounded != exactly) < 0.0012


def on_mesh(arrays, sizes):
    """Returns the kernels' (y, gradients) of maps on a mesh, in interpret mode."""
    *args, dout = arrays

    def run(*args):
        y, vjp = jax.vjp(lambda *args: mlp.on_tpu(*args, True), *args)
        return y, *vjp(dout)

    with jax.set_mesh(make_mesh(sizes, jax.devices()[: math.prod(sizes)])):
        return jax.jit(run)(*args)


@pytest.mark.parametrize("images, here", [(4, 2), (3, 3)])  # 3 images do not divide over two devices
def test_on_a_mesh_each_device_takes_its_images_and_the_gradients_of_weights_are_sums(images, here):
    x, *weights, skip, dout = example(images * 16, 16)
    maps = [a.reshape(images, 2, 8, 16) for a in (x, skip, dout)]
    got = on_mesh([maps[0], *weights, *maps[1:]], (1, 1, 2, 1))
    assert got[0].addressable_shards[0].data.shape == (here, 2, 8, 16)
    for ours, theirs in zip(got, torch_block(x, *weights, skip, dout), strict=True):
        assert error(ours.reshape(theirs.shape), theirs) < 1e-6


@pytest.mark.parametrize(
    "shape, kernels, expected",
    [
        ((2, 32, 32, 96), "auto", 2),
        ((2, 32, 32, 96), "none", 0),
        ((2, 32, 36, 96), "auto", 0),  # rows of 36 do not fill tiles
        ((1, 32, 32, 96), "auto", 0),  # few positions
        ((2, 32, 32, 64), "auto", 0),  # few channels
        ((2, 32, 32, 512), "auto", 0),  # too many
    ],
)
def test_the_mesh_the_shape_and_the_caller_choose_the_form(shape, kernels, expected):
    assert calls(shape, kernels, topology.devices(topology.parse("v5e:1x1"))) == expected
    assert calls(shape, kernels, jax.devices()[:1]) == 0


def test_the_images_of_a_device_choose_the_form():
    devices = topology.devices(topology.parse("v5e:2x2"))  # 1024 and 2048 positions a device
    assert [calls((images, 32, 32, 96), "auto", devices) for images in (4, 8)] == [0, 2]


def calls(shape, kernels, devices):
    """Returns the number of kernels in the program of `mlp` and its gradients for a mesh of devices."""
    C = shape[-1]
    sizes = [shape, (C, 4 * C), (4 * C,), (4 * C, C), (C,), shape, shape]
    *args, dout = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes)

    def run(dout, *args):
        y, vjp = jax.vjp(partial(mlp.mlp, kernels=kernels), *args)
        return y, vjp(dout)

    with topology.compiler(), jax.set_mesh(make_mesh((1, -1, 1, 1), devices)):
        return str(jax.make_jaxpr(run)(dout, *args)).count("pallas_call[")


@pytest.mark.parametrize("form", [mlp.mlp, mlp.plain])
def test_where_kernels_would_run_a_cpu_computes_the_same_with_gradients(form):
    x, *weights, skip, dout = example(2048, 96)
    maps = [a.reshape(2, 32, 32, 96) for a in (x, skip, dout)]
    y, vjp = jax.vjp(form, maps[0], *weights, maps[1])
    for ours, theirs in zip((y, *vjp(maps[2])), torch_block(x, *weights, skip, dout), strict=True):
        assert error(ours.reshape(theirs.shape), theirs) < 1e-6


FOUND = {"all-reduce", "pointwise_block", "pointwise_block_gradients"}


def compiled(name, dtype, channels):
    """The kernels and the collectives in the program of a gradient."""
    C, F = channels, 4 * channels
    x, *weights = (jax.ShapeDtypeStruct(size, dtype) for size in ((8, 64, 64, C), (C, F), (F,), (F, C), (C,)))
    text = gradient_program(name, lambda x, weights: mlp.mlp(x, *weights, x), x, weights)
    return set(re.findall(r"%(pointwise_block\w*|all-[a-z]+|collective-permute|reduce-scatter)", text))


def test_the_v5e_compiler_takes_the_kernels_on_a_mesh_and_gathers_no_activations():
    assert compiled("v5e:2x2", jnp.bfloat16, 96) == FOUND


@pytest.mark.full
@pytest.mark.parametrize("channels", [96, 192, 384])
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, jnp.bfloat16) for name in (*OTHERS, "v5e:2x2")),
        ("v4:2x2x1", jnp.float32),  # the smallest memory on the chip
        ("v5e:2x2", jnp.float32),
    ],
)
def test_every_generation_takes_all_sizes(name, dtype, channels):
    assert compiled(name, dtype, channels) == FOUND
