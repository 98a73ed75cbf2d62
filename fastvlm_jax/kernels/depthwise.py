"""Depthwise convolution: one function, with the implementation that is fastest on each platform.

| platform | implementation | reason |
|---|---|---|
| TPU, stride 1, maps of 8 n x 16 m in bfloat16 | Pallas kernels, depthwise_tpu.py | see docs/kernels.md |
| TPU, stride 2, two outputs a channel, 16 n x 32 m | Pallas kernels, depthwise_stride2_tpu.py | at most a quarter |
| TPU, GPU | XLA's convolution, one for each output of a channel | on TPU shifted adds are 2 to 3 times slower |
| CPU | shifted multiply-adds with a hand-written backward pass | XLA's convolution is 10 to 50 times slower there |
| CPU, large maps | the same, in blocks of rows | seven times faster in a scanned layer |
| CPU, small maps | one matrix product per channel | takes a third of the time of the shifts at 4x4 |

The platform is the target of the compilation, not the machine that compiles: a program for TPU can be compiled on a CPU
machine. For Pallas kernels the mesh says whether it is a TPU: see choice.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastvlm_jax import sharding
from fastvlm_jax.kernels import choice, depthwise_stride2_tpu, depthwise_tpu

ROWS = 8  # rows of a large map that a CPU computes at a time; 1 to 16 are equally fast


def depthwise_conv(x, kernel, *, stride=1, kernels="auto"):
    """Applies a zero-padded depthwise convolution: torch's Conv2d(C, C*m, k, stride, k//2, groups=C, bias=False).

    Only first derivatives with respect to x and kernel are supported.

    Args:
      x: [B, H, W, C], float32 or bfloat16, of any H and W, also odd ones and ones smaller than the kernel.
      kernel: [k, k, 1, C*m] with k odd. Output channel o reads input channel o // m. May be float32 if x is bfloat16.
      stride: 1 or 2.
      kernels: whether the TPU kernels are used, see choice.py.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), C*m] in x.dtype, accumulated in float32.

    Raises:
      ValueError: the rank, kernel size, number of channels or stride is not one of these.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [B, H, W, C], got shape {x.shape}")
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1] or kernel.shape[2] != 1:
        raise ValueError(f"kernel must be [k, k, 1, C*m], got shape {kernel.shape}")
    _, height, width, channels = x.shape
    k, _, _, outputs = kernel.shape
    if k % 2 == 0:
        raise ValueError(f"kernel size must be odd, got {k}x{k}")
    if outputs == 0 or outputs % channels:
        raise ValueError(f"kernel has {outputs} output channels, not a multiple of the {channels} channels of x")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")

    # Removes the taps that only ever see padding: of a 7x7 kernel's 49 taps, 9 remain on a 2x2 map, one on a 1x1 map.
    top, bottom = _live_taps(k, height, stride)
    left, right = _live_taps(k, width, stride)
    kernel = kernel[k // 2 - top : k // 2 + bottom + 1, k // 2 - left : k // 2 + right + 1]
    form = depthwise_tpu if stride == 1 else depthwise_stride2_tpu
    if form.fits(x, kernel) and choice.used(kernels):
        return _on_tpu(x, kernel, stride, kernels == "interpret")
    return _depthwise(x, kernel, stride, ((top, bottom), (left, right)))


def _live_taps(k, size, stride):
    """Returns how many taps before and after the centre ever see a real row or column.

    As padding, these two numbers give ceil(size / stride) outputs.
    """
    last_output = (size - 1) // stride * stride
    return min(k // 2, last_output), min(k // 2, size - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride, padding):
    cpu, conv = (functools.partial(form, stride=stride, padding=padding) for form in (_cpu, _conv))
    return lax.platform_dependent(x, kernel, cpu=cpu, default=conv)


def _forward(x, kernel, stride, padding):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    cpu, conv = (functools.partial(form, stride=stride, padding=padding) for form in (_cpu_vjp, _conv_vjp))
    return lax.platform_dependent(*residuals, dy, cpu=cpu, default=conv)


_depthwise.defvjp(_forward, _backward)


# The TPU kernels: each device for its own images.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _on_tpu(x, kernel, stride, interpret):
    def forward(x, kernel):
        if stride == 2:
            return depthwise_stride2_tpu.forward(x, kernel, interpret)
        return depthwise_tpu.forward(x, depthwise_tpu.taps(kernel), interpret=interpret)

    maps, whole = sharding.map_axes(len(x)), (None,) * 4
    return sharding.on_shards(forward, (maps, whole), maps)(x, kernel)


def _on_tpu_forward(x, kernel, stride, interpret):
    return _on_tpu(x, kernel, stride, interpret), (x, kernel)


def _on_tpu_backward(stride, interpret, residuals, dy):
    x, kernel = residuals
    maps, whole = sharding.map_axes(len(x)), (None,) * 4

    def backward(x, kernel, dy):
        if stride == 2:
            dx, dkernel = depthwise_stride2_tpu.backward(x, kernel, dy, interpret)
        else:
            dx, dtaps = depthwise_tpu.backward(x, depthwise_tpu.taps(kernel), dy, interpret=interpret)
            dkernel, _ = depthwise_tpu.kernel_and_bias(jnp.sum(dtaps, axis=0))
        dkernel = dkernel.astype(kernel.dtype)
        return dx, sharding.sum_batch(dkernel) if maps[0] else dkernel

    return sharding.on_shards(backward, (maps, whole, maps), (maps, whole))(x, kernel, dy)


_on_tpu.defvjp(_on_tpu_forward, _on_tpu_backward)


def _conv(x, kernel, stride, padding):
    # Interleaves the outputs of m depthwise convolutions. One convolution with m outputs per channel is the same
    # function, but its backward pass on TPU is 120 times slower and takes 100 times the memory.
    channels = x.shape[3]
    multiplier = kernel.shape[3] // channels
    outputs = [
        lax.conv_general_dilated(
            x,
            kernel[..., j::multiplier].astype(x.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )
        for j in range(multiplier)
    ]
    y = jnp.stack(outputs, axis=4)
    return y.reshape(*y.shape[:3], channels * multiplier)


def _conv_vjp(x, kernel, dy, stride, padding):
    return jax.vjp(functools.partial(_conv, stride=stride, padding=padding), x, kernel)[1](dy)


# The CPU implementations compute in float32.


def _cpu(x, kernel, stride, padding):
    form = _matmul if _is_small(x, kernel) else _shift
    return form(x.astype(jnp.float32), kernel.astype(jnp.float32), stride, padding).astype(x.dtype)


def _cpu_vjp(x, kernel, dy, stride, padding):
    f32 = [a.astype(jnp.float32) for a in (x, kernel, dy)]
    if _is_small(x, kernel):
        dx, dkernel = jax.vjp(functools.partial(_matmul, stride=stride, padding=padding), *f32[:2])[1](f32[2])
    else:
        dx, dkernel = _shift_dx(*f32, stride, padding), _shift_dkernel(*f32, stride, padding)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _is_small(x, kernel):
    # The matrix product takes H*W multiply-adds per output, the shifts one per tap, and only a large batch repays
    # building the matrices. At 2x2 and 1x1 few taps remain: the shifts take at most 0.2 ms more, and a third of the
    # compile time.
    batch, height, width, _ = x.shape
    taps = kernel.shape[0] * kernel.shape[1]
    return 4 < height * width <= min(1.5 * taps, 2 * batch)


def _matmul(x, kernel, stride, padding):
    """Multiplies each channel's flattened map by a [H*W, Ho*Wo*m] matrix.

    The matrix holds, for each pair of an input and an output pixel, the kernel tap that connects them, or 0.
    """
    rows, cols = (
        (r == o * stride + tap - before).astype(np.float32)
        for size, (before, after) in zip(x.shape[1:3], padding, strict=True)
        for tap, r, o in [np.ogrid[: before + after + 1, :size, : -(-size // stride)]]
    )
    channels = x.shape[3]
    kernel = kernel.reshape(*kernel.shape[:2], channels, -1)
    matrices = jnp.einsum("ijcm,jwq,ihp->chwpqm", kernel, cols, rows)
    y = jnp.einsum("bhwc,chwpqm->bpqcm", x, matrices)
    return y.reshape(*y.shape[:3], -1)


def _shift(x, kernel, stride, padding):
    """Does one multiply-add per tap; XLA fuses them into one loop, which LLVM vectorizes over the channels."""
    rows, cols = _outputs(x, stride)
    block = min(ROWS, -(-rows // 2)) if _is_large(x, kernel) else rows
    blocks = -(-rows // block)
    extra = stride * (blocks * block - rows)  # rows below, for a last block that is not whole
    x = _pad(x, kernel, ((padding[0][0], padding[0][1] + extra), padding[1]))
    if blocks == 1:
        return _multiply_add(x, kernel, stride, rows, cols)
    return _in_blocks(x, kernel, stride, block, blocks, cols)[:, :rows]


def _multiply_add(x, kernel, stride, rows, cols):
    windows, taps = _windows(x, kernel, stride, rows, cols), kernel.reshape(-1, kernel.shape[3])
    return sum(window * tap for window, tap in zip(windows, taps, strict=True))


# Without jax.checkpoint the gradient of a program for TPU would store the zeros and indices of this loop.
@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4, 5))
def _in_blocks(x, kernel, stride, block, blocks, cols):
    """Computes a large map in blocks of rows, because XLA fuses nothing across the loop over the blocks.

    Into the multiply-adds of a whole map it fuses what makes the kernel, and computes it again for each tap of each
    pixel: the folded BatchNorm, and the slice of the kernels of scanned layers. In a scanned block of 64x64x192 the 7x7
    convolution then takes seven times as long as alone.
    """
    reach = stride * (block - 1) + kernel.shape[0]  # rows that a block reads

    def add(i, y):
        part = lax.dynamic_slice_in_dim(x, i * stride * block, reach, axis=1)
        part = _multiply_add(part, kernel, stride, block, cols)
        return lax.dynamic_update_slice_in_dim(y, part, i * block, axis=1)

    return lax.fori_loop(0, blocks, add, jnp.zeros((len(x), blocks * block, cols, kernel.shape[3]), jnp.float32))


def _is_large(x, kernel):
    # On the maps of the tiny tower copying the blocks costs more than it saves.
    _, height, width, channels = x.shape
    return channels >= 64 and height * width * kernel.shape[3] >= 2**15


def _outputs(x, stride):
    return tuple(-(-size // stride) for size in x.shape[1:3])


def _pad(x, kernel, padding):
    """Returns x padded, each channel repeated for its outputs: [B, Hp, Wp, C*m]."""
    return jnp.pad(jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3), ((0, 0), *padding, (0, 0)))


def _windows(x, kernel, stride, rows, cols):
    """Returns the pixels of a padded x that each tap multiplies, [B, rows, cols, C*m]; the taps go row by row."""
    return [
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]


def _shift_dkernel(x, kernel, dy, stride, padding):
    # One reduction of many arrays reads dy once for all its taps: at 7x7 it is 2 to 6 times faster than a reduction for
    # each tap, and compiles 4 times faster. Groups of 25, fewer than a core's 32 vector registers, are up to 1.5 times
    # faster than one of 49. The batch axis, which may be sharded, is summed separately at the end.
    windows = _windows(_pad(x, kernel, padding), kernel, stride, *_outputs(x, stride))
    products = [window * dy for window in windows]
    sums = []
    for start in range(0, len(products), 25):
        group = products[start : start + 25]
        sums += lax.reduce(group, [jnp.float32(0)] * len(group), lambda a, b: [*map(jnp.add, a, b)], (1, 2))
    return jnp.stack(sums).sum(axis=1).reshape(kernel.shape)


def _shift_dx(x, kernel, dy, stride, padding):
    """Computes dx by shifting dy.

    Input row stride*q + phase receives, through tap i, output row q + (phase + top - i) / stride if that is an integer.
    Each of the stride*stride phases of dx is therefore a sum of shifted dy. The alternative, dy with zeros between its
    rows, takes four times the multiply-adds and is 3 to 5 times slower at 7x7.
    """
    batch, height, width, channels = x.shape
    _, rows, cols, _ = dy.shape
    (top, bottom), (left, right) = padding
    before, after = (bottom // stride, right // stride), (-(-top // stride), -(-left // stride))
    dy = jnp.pad(dy, ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)))
    dy = dy.reshape(*dy.shape[:3], channels, -1)
    kernel = kernel.reshape(*kernel.shape[:2], channels, -1)

    def phase(a, b):
        dx = jnp.zeros((batch, rows, cols, channels), jnp.float32)  # remains where no tap fits, as with k=1, stride=2
        for tap_i in range((a + top) % stride, kernel.shape[0], stride):
            for tap_j in range((b + left) % stride, kernel.shape[1], stride):
                i, j = before[0] + (a + top - tap_i) // stride, before[1] + (b + left - tap_j) // stride
                for output in range(kernel.shape[3]):
                    dx += dy[:, i : i + rows, j : j + cols, :, output] * kernel[tap_i, tap_j, :, output]
        return dx

    phases = [jnp.stack([phase(a, b) for b in range(stride)], axis=3) for a in range(stride)]
    dx = jnp.stack(phases, axis=2)  # [B, Ho, stride, Wo, stride, C]
    return dx.reshape(batch, stride * rows, stride * cols, channels)[:, :height, :width]
