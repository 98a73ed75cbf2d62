"""Two convolutions of stride 2, one behind the other, on a whole image, as TPUs like them: how a tower's stem starts.

    image [B, H, W, 3] -- image_conv --> pixels [B, H/4, W/4, 4C] -- pixel_conv --> map [B, H/4, W/4, C]

Between them stands the map [B, H/2, W/2, C] with the pixels of a 2x2 window in the channels of a position: (2h + a,
2w + b) in channels (2a + b) * C to (2a + b + 1) * C. Both convolutions then have stride 1 and read lanes that are full,
where three channels of an image fill 128 lanes. On other platforms the multiply-adds with zeros cost more than that.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fastvlm_jax.sharding import map_axes, on_shards, sum_batch

EXACT = lax.Precision.HIGHEST  # of float32 on TPU: neither moving pixels nor a depthwise convolution rounds to bfloat16


def image_conv(x, kernel):
    """Convolves images with stride 2 and zero padding k//2; returns the result with four pixels in the channels.

    Only first derivatives with respect to x and kernel are supported.

    Args:
      x: [B, H, W, D], float32 or bfloat16; 4 divides H and W.
      kernel: [k, k, D, C] in the dtype of x, k = 1 or 3.

    Returns:
      [B, H/4, W/4, 4C] in x.dtype.

    Raises:
      ValueError: the image or the kernel has another size.
    """
    if x.ndim != 4 or x.shape[1] % 4 or x.shape[2] % 4:
        raise ValueError(f"images must be [B, H, W, D] with H and W multiples of 4, got shape {x.shape}")
    if kernel.shape[:3] not in ((1, 1, x.shape[3]), (3, 3, x.shape[3])):
        raise ValueError(f"kernel must be [k, k, {x.shape[3]}, C] with k = 1 or 3, got shape {kernel.shape}")
    return _unit_stride(_blocks, _block_kernel, None, x, kernel)


def pixel_conv(x, kernel):
    """Applies a depthwise convolution of stride 2 and zero padding k//2 to a map with four pixels in the channels.

    Only first derivatives with respect to x and kernel are supported.

    Args:
      x: [B, h, w, 4C], float32 or bfloat16, as `image_conv` gives it.
      kernel: [k, k, 1, C] in the dtype of x, k = 1 or 3.

    Returns:
      [B, h, w, C] in x.dtype.

    Raises:
      ValueError: x or the kernel has another size.
    """
    C = kernel.shape[-1]
    if kernel.shape not in ((1, 1, 1, C), (3, 3, 1, C)):
        raise ValueError(f"kernel must be [k, k, 1, C] with k = 1 or 3, got shape {kernel.shape}")
    if x.ndim != 4 or x.shape[3] != 4 * C:
        raise ValueError(f"pixels must be [B, h, w, {4 * C}], got shape {x.shape}")
    return _unit_stride(_unchanged, _pixel_kernel, EXACT, x, kernel)


def _conv(rearranged, made, precision, x, kernel):
    """Convolves the rearranged x with the kernel that is made from `kernel`."""
    kernel = made(kernel)
    return lax.conv_general_dilated(
        rearranged(x), kernel, (1, 1), _padding(kernel), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def _padding(kernel):
    return [(kernel.shape[0] - 1, 0)] * 2  # above and to the left


def _backward(rearranged, made, precision, residuals, dy):
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: _conv(rearranged, made, precision, x, kernel), x)[1](dy)
    maps = map_axes(len(x))

    def gradient(x, dy):
        # In float32, because a tap of the kernel stands in several places of the one that is made from it: their
        # gradients are added up before they are rounded.
        float32 = jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
        of_made = lax.conv_general_dilated(
            rearranged(x),
            dy,
            (1, 1),
            _padding(jax.eval_shape(made, float32)),
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        dkernel = jax.linear_transpose(made, float32)(of_made)[0].astype(kernel.dtype)
        return sum_batch(dkernel) if maps[0] else dkernel

    # Each device for its own images: devices exchange the gradient of the kernel, not of the larger one that is made.
    return dx, on_shards(gradient, (maps, maps), (None,) * 4)(x, dy)


_unit_stride = jax.custom_vjp(_conv, nondiff_argnums=(0, 1, 2))
_unit_stride.defvjp(lambda *args: (_unit_stride(*args), args[3:]), _backward)


def _unchanged(x):
    return x


def _blocks(x):
    """Rearranges images [B, H, W, D] to blocks [B, H/4, W/4, 16D].

    Moves the columns by a product with zeros and ones, which is exact and a twelfth of the time of a transpose: XLA
    lays images out with the columns in the lanes, and the matrix units pick every fourth lane on their way.
    """
    B, H, W, D = x.shape
    columns = jnp.arange(W).reshape(W // 4, 4)
    moves = (jnp.arange(W)[:, None, None] == columns).astype(x.dtype)
    rows = x.reshape(B, H // 4, 4, W, D)
    return jnp.einsum("bhiwd,wvj->bhvijd", rows, moves, precision=EXACT).reshape(B, H // 4, W // 4, 16 * D)


def _block_kernel(kernel):
    """Returns the kernel [n, n, 16D, 4C] that convolves blocks as `kernel` [k, k, D, C] does images; n = 1 if k = 1.

    Its rows and columns are those of the block before, if the kernel reaches into it (n = 2), and of the block itself.
    """
    windows = [_in_blocks(kernel, 4, 2 * row, 2 * column) for row in range(2) for column in range(2)]
    taps = jnp.stack(windows, axis=3)
    return taps.reshape(*taps.shape[:3], -1)


def _pixel_kernel(kernel):
    """Returns the dense kernel [n, n, 4C, C] that convolves windows of pixels as `kernel` [k, k, 1, C] does the map.

    Most of it is zeros, and still a fourth of the time of a depthwise convolution of stride 2.
    """
    k, _, _, C = kernel.shape
    return _in_blocks(kernel.reshape(k, k, C, 1) * jnp.eye(C, dtype=kernel.dtype), 2, 0, 0)


def _in_blocks(kernel, size, row, column):
    """Returns the kernel of blocks, [n, n, size * size * D, C], that does what [k, k, D, C] does at a pixel of each."""
    k, _, D, C = kernel.shape
    blocks = 1 if k == 1 else 2
    padding = []
    for place in (row, column):
        before = size * (blocks - 1) + place - k // 2
        padding.append((before, size * blocks - k - before))
    taps = jnp.pad(kernel, [*padding, (0, 0), (0, 0)]).reshape(blocks, size, blocks, size, D, C)
    return taps.transpose(0, 2, 1, 3, 4, 5).reshape(blocks, blocks, size * size * D, C)
