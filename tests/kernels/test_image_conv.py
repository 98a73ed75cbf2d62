"""The stem's convolutions for TPU: against torch, pixel by pixel, and their rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastvlm_jax import sharding
from fastvlm_jax.kernels.image_conv import _block_kernel, _blocks, _pixel_kernel, image_conv, pixel_conv

# (B, H, W, channels of the image), kernel size, channels of the map
IMAGES = [((2, 8, 12, 3), 3, 5), ((1, 4, 4, 3), 3, 4), ((2, 12, 8, 2), 1, 3)]
# (B, h, w), kernel size, channels of the map
MAPS = [((2, 3, 4), 3, 5), ((1, 1, 1), 3, 4), ((2, 2, 3), 1, 3)]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_channels(map_BCHW):
    """Rearranges [B, C, 2h, 2w] to [B, h, w, 4C], pixel by pixel."""
    B, C, H, W = map_BCHW.shape
    out = np.zeros((B, H // 2, W // 2, 4 * C))
    for row in range(H):
        for column in range(W):
            n = 2 * (row % 2) + column % 2
            out[:, row // 2, column // 2, n * C : (n + 1) * C] = map_BCHW[:, :, row, column]
    return out


def map_of(pixels_BhwX):
    """Rearranges [B, h, w, 4C] to [B, C, 2h, 2w]."""
    B, h, w, X = pixels_BhwX.shape
    out = np.zeros((B, X // 4, 2 * h, 2 * w))
    for n, part in enumerate(np.split(pixels_BhwX, 4, axis=3)):
        out[:, :, n // 2 :: 2, n % 2 :: 2] = part.transpose(0, 3, 1, 2)
    return torch.tensor(out)


def torch_conv(x, kernel, dy, groups):
    """Returns torch's (y, dx, dkernel) in float64; y and dx are [B, C, H, W]."""
    x, kernel = x.requires_grad_(), torch.tensor(kernel).permute(3, 2, 0, 1).requires_grad_()
    y = torch.nn.functional.conv2d(x, kernel, stride=2, padding=kernel.shape[2] // 2, groups=groups)
    y.backward(dy)
    return y.detach().numpy(), x.grad.numpy(), kernel.grad.permute(2, 3, 1, 0).numpy()


def rounded(dtype, *shapes):
    return [np.asarray(jnp.asarray(normal(seed, *shape), dtype), np.float64) for seed, shape in enumerate(shapes)]


def image_example(case, dtype):
    """Returns the arguments of an image_conv, the gradient of its result, and torch's (y, dx, dkernel)."""
    (B, H, W, D), k, C = case
    x, kernel, dy = rounded(dtype, (B, H, W, D), (k, k, D, C), (B, H // 4, W // 4, 4 * C))
    y, dx, dkernel = torch_conv(torch.tensor(x).permute(0, 3, 1, 2), kernel, map_of(dy), groups=1)
    return (x, kernel, dy), (in_channels(y), dx.transpose(0, 2, 3, 1), dkernel)


def pixel_example(case, dtype):
    """Returns the same of a pixel_conv."""
    (B, h, w), k, C = case
    x, kernel, dy = rounded(dtype, (B, h, w, 4 * C), (k, k, 1, C), (B, h, w, C))
    y, dx, dkernel = torch_conv(map_of(x), kernel, torch.tensor(dy).permute(0, 3, 1, 2), groups=C)
    return (x, kernel, dy), (y.transpose(0, 2, 3, 1), in_channels(dx), dkernel)


EXAMPLES = [(image_conv, image_example, case) for case in IMAGES] + [(pixel_conv, pixel_example, case) for case in MAPS]
examples = pytest.mark.parametrize("conv, example, case", EXAMPLES, ids=lambda x: getattr(x, "__name__", str(x)))


def forward_and_backward(conv, x, kernel, dy):
    @jax.jit  # made anew, so that no test reuses another's program
    def run(x, kernel, dy):
        y, vjp = jax.vjp(conv, x, kernel)
        return y, *vjp(dy)

    return run(x, kernel, dy)


@examples
def test_equals_torch_forward_and_backward(conv, example, case):
    arrays, expected = example(case, jnp.float32)
    actual = forward_and_backward(conv, *(jnp.asarray(a, jnp.float32) for a in arrays))
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@examples
def test_bfloat16_is_rounded_once(conv, example, case):
    """Sums are of float32, and of the gradients that a tap receives in several places too."""
    arrays, expected = example(case, jnp.bfloat16)
    actual = forward_and_backward(conv, *(jnp.asarray(a, jnp.bfloat16) for a in arrays))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=2**-8, atol=1e-5)


def test_blocks_keep_every_bit_of_a_pixel():
    pixels = normal(0, 2, 8, 12, 3) * np.float32(1e-3)
    blocks = np.asarray(_blocks(jnp.asarray(pixels)))
    for row in range(8):
        for column in range(12):
            n = 3 * (4 * (row % 4) + column % 4)
            np.testing.assert_array_equal(blocks[:, row // 4, column // 4, n : n + 3], pixels[:, row, column])


def test_a_kernel_of_one_tap_reads_no_block_before():
    assert _block_kernel(jnp.ones((1, 1, 3, 8))).shape == (1, 1, 48, 32)
    assert _pixel_kernel(jnp.ones((1, 1, 1, 8))).shape == (1, 1, 32, 8)


def stem(x, first, second):
    return pixel_conv(image_conv(x, first), second).sum()


def test_float32_is_not_rounded_on_tpu_where_the_usual_form_is_not():
    """Moved pixels and the depthwise convolution keep the highest precision, the image's convolution the default."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, 3), (3, 3, 3, 4), (3, 3, 1, 4))]
    text = jax.jit(jax.grad(stem, argnums=(1, 2))).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
    image = [line for line in products if "2x2x48x16x" in line]
    assert len(image) == 2 and not any("HIGHEST" in line for line in image)
    assert len(products) >= 6 and all("HIGHEST" in line for line in products if line not in image)


def test_sharding_the_batch_changes_nothing():
    """The devices add up the gradients of the kernels: by `sum_batch`, as the mesh is that of `jax.set_mesh`."""
    mesh = sharding.make_mesh((1, 8, 1, 1))
    arrays = normal(0, 8, 8, 8, 3), normal(1, 3, 3, 3, 4), normal(2, 3, 3, 1, 4)
    step = lambda *arrays: jax.value_and_grad(stem, argnums=(1, 2))(*arrays)  # noqa: E731
    alone = jax.jit(step)(*arrays)
    with jax.set_mesh(mesh):
        spread = jax.device_put(arrays[0], sharding.batch_sharding(mesh)), *arrays[1:]
        together, text = jax.jit(step)(*spread), jax.jit(step).lower(*spread).compile().as_text()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), alone, together)
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize(
    "conv, x, kernel, message",
    [
        (image_conv, (2, 8, 6, 3), (3, 3, 3, 4), r"H and W multiples of 4, got shape \(2, 8, 6, 3\)"),
        (image_conv, (2, 6, 8, 3), (3, 3, 3, 4), r"H and W multiples of 4, got shape \(2, 6, 8, 3\)"),
        (image_conv, (8, 8, 3), (3, 3, 3, 4), r"H and W multiples of 4, got shape \(8, 8, 3\)"),
        (image_conv, (2, 8, 8, 3), (3, 3, 1, 4), r"kernel must be \[k, k, 3, C\] with k = 1 or 3"),
        (image_conv, (2, 8, 8, 3), (7, 7, 3, 4), r"kernel must be \[k, k, 3, C\] with k = 1 or 3"),
        (pixel_conv, (2, 8, 8, 16), (7, 7, 1, 4), r"kernel must be \[k, k, 1, C\] with k = 1 or 3"),
        (pixel_conv, (2, 8, 8, 4), (3, 3, 1, 4), r"pixels must be \[B, h, w, 16\], got shape \(2, 8, 8, 4\)"),
    ],
)
def test_a_mismatch_is_named(conv, x, kernel, message):
    with pytest.raises(ValueError, match=message):
        conv(jnp.zeros(x), jnp.zeros(kernel))
