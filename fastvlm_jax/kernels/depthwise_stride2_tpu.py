"""Depthwise convolutions of stride 2 with two outputs a channel as Pallas kernels for TPU: see depthwise_tpu.py first.

Columns lie on the sublanes of a float32 scratch, so every second one is a load with a stride, and each load serves both
outputs of a channel. Gradients take the pixels in four phases, by the parity of row and column: one shifted load of dy
serves all taps of its phase in a column, for the gradient of x and of the kernel.

The outputs 2c and 2c + 1 of channel c stand side by side in the result, but on lane c of two vectors in the kernels. A
product with zeros and ones brings them there and back, on matrix units that have nothing else to do. Finite values come
through exactly; an infinite one or NaN makes NaN of all channels of its vector, at that pixel.

Estimates for one v5e and one image, 7x7, in M cycles (nothing here was measured on a TPU):

| x | forward: XLA | kernel | floor | backward: XLA | kernel | floor |
|---|---|---|---|---|---|---|
| 256x256x96 | 1.04 | 0.143 | 0.100 | 5.61 | 0.238 | 0.201 |
| 128x128x192 | 0.58 | 0.075 | 0.050 | 2.85 | 0.136 | 0.100 |
| 64x64x384 | 0.30 | 0.028 | 0.019 | 1.12 | 0.048 | 0.038 |
| 32x32x768 | 0.21 | 0.015 | 0.009 | 0.60 | 0.026 | 0.019 |

XLA: the sum of `estimated_cycles` of depthwise.py's two convolutions, alone in their program. Kernel: bundles of the
compiler's schedule, one a cycle, times the grid steps; they see no stall. Floor: four multiplies or additions a cycle.
The kernels cost the same an image for any number of images. XLA's form takes less for each of 8 images: 0.72 and 1.47
for the first x, 0.31 and 0.61 for the second, 0.06 and 0.11 for the last. 3x3 at 64x64x384: 0.21 and 0.25 with XLA, one
image, 0.010 and 0.015 with the kernels.

XLA's figures hold copies of maps to another layout, the kernels' do not. With all copies, a PatchEmbed alone in its
program, folded, forward and backward of 8 images, takes 7.8 instead of 17.7 for the first x, 3.3 instead of 9.5 for the
second.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fastvlm_jax.kernels.depthwise_tpu import (
    COLUMNS,
    GROUP,
    LANES,
    SUBLANES,
    fill,
    float32,
    held,
    over_tiles,
    padded,
    rows_that_fit,
    spread,
    vmem,
    with_halos,
)

_BOTH = 2 * LANES  # lanes of both outputs
_AROUND = 2  # rows of dy above and below a grid step's own


def fits(x: jax.Array, kernel: jax.Array) -> bool:
    """Returns whether the kernels take x, [B, H, W, C], and a kernel, [k, k, 1, 2C], at stride 2."""
    _, height, width, channels = x.shape
    rows, columns, _, outputs = kernel.shape
    square = rows == columns and rows in (3, 5, 7) and outputs == 2 * channels
    return square and x.dtype == jnp.bfloat16 and height % (2 * GROUP) == 0 and width % (2 * COLUMNS) == 0


def forward(x: jax.Array, kernel: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns the zero-padded depthwise convolution of stride 2 of x, which `fits`.

    Args:
      x: [B, H, W, C], bfloat16.
      kernel: [k, k, 1, 2C]; output channel o reads input channel o // 2.
      interpret: whether to run on a CPU, slowly, for tests.

    Returns:
      [B, H / 2, W / 2, 2C] in x.dtype, summed in float32.
    """
    (batch, height, width, channels), k = x.shape, len(kernel)
    rows = rows_that_fit(height // 2, lambda rows: held(2 * rows + k - 1, 3 * rows + 8, width))
    return pl.pallas_call(
        functools.partial(_forward, k=k, channels=channels),
        grid=(-(-channels // LANES), batch, height // 2 // rows),
        in_specs=[*with_halos(k // 2, None, 2 * rows, height, width), _taps_spec(k), _order_spec()],
        out_specs=_own(rows, width // 2, _BOTH),
        out_shape=jax.ShapeDtypeStruct((batch, height // 2, width // 2, 2 * channels), x.dtype),
        scratch_shapes=[vmem(padded(2 * rows + k - 1, width)), vmem((2 * k * k, SUBLANES, LANES))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name=f"depthwise_{k}x{k}_stride2",
    )(x, x, x, _taps(kernel), _order())


def backward(x: jax.Array, kernel: jax.Array, dy: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x, in its dtype, and of the kernel, in float32, summed over the images.

    Args:
      x, kernel: as in `forward`.
      dy: [B, H / 2, W / 2, 2C] in the dtype of x.
    """
    (batch, height, width, channels), k = x.shape, len(kernel)
    rows = rows_that_fit(height // 2, lambda rows: 2 * held(rows + 2 * _AROUND, 5 * rows + 8, width // 2))
    sums = 2 * k * k
    dx, found = pl.pallas_call(
        functools.partial(_backward, k=k, channels=channels),
        grid=(-(-channels // LANES), batch, height // 2 // rows),
        in_specs=[
            *with_halos(_AROUND, None, rows, height // 2, width // 2, _BOTH),
            _own(2 * rows, width, LANES),
            _taps_spec(k),
            _order_spec(),
        ],
        # Sums for each image, so that two cores may share the images.
        out_specs=[_own(2 * rows, width, LANES), pl.BlockSpec((1, sums, LANES), lambda c, b, h: (b, 0, c))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, sums, channels), jnp.float32),
        ],
        scratch_shapes=[
            vmem((2, *padded(rows + 2 * _AROUND, width // 2))),
            vmem((sums, SUBLANES, LANES)),
            vmem((sums, SUBLANES, LANES)),
            vmem((2 * GROUP, 2 * SUBLANES, LANES)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=f"depthwise_{k}x{k}_stride2_backward",
    )(dy, dy, dy, x, _taps(kernel), _order().T)
    return dx, found.sum(0).reshape(2, k, k, 1, channels).transpose(1, 2, 3, 4, 0).reshape(kernel.shape)


def _taps(kernel: jax.Array) -> jax.Array:
    """Returns a kernel [k, k, 1, 2C] as float32 [2 k k, C]: first the taps of all outputs 2c, then of all 2c + 1."""
    k, C = len(kernel), kernel.shape[3] // 2
    return kernel.astype(jnp.float32).reshape(k * k, C, 2).transpose(2, 0, 1).reshape(2 * k * k, C)


def _order() -> jax.Array:
    """Returns zeros and ones that bring outputs [.., 2 LANES], all 2c before all 2c + 1, side by side."""
    places = jnp.arange(_BOTH).reshape(LANES, 2).T.reshape(_BOTH, 1)
    return (places == jnp.arange(_BOTH)).astype(jnp.bfloat16)


def _own(rows: int, width: int, lanes: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, rows, width, lanes), lambda c, b, h: (b, h, 0, c))


def _taps_spec(k: int) -> pl.BlockSpec:
    return pl.BlockSpec((2 * k * k, LANES), lambda c, b, h: (0, c))


def _order_spec() -> pl.BlockSpec:
    return pl.BlockSpec((_BOTH, _BOTH), lambda c, b, h: (0, 0))


def _product(rows: jax.Array, order: jax.Array) -> jax.Array:
    """Returns rows [.., 2 LANES] times zeros and ones, exactly."""
    found = jnp.dot(rows.reshape(-1, _BOTH), order, preferred_element_type=jnp.float32)
    return found.reshape(*rows.shape[:-1], order.shape[1])


def _forward(above, own, below, taps, order, y, scratch, wide, *, k: int, channels: int) -> None:
    p = k // 2
    fill(scratch, above, own, below, p)
    spread(taps, wide)
    live = _live(channels, LANES)

    def tile(top, left):
        halves = []
        for half in range(0, COLUMNS, SUBLANES):
            sums = [[0.0] * GROUP, [0.0] * GROUP]
            for row in range(2 * GROUP + k - 2):  # row by row, as in depthwise_tpu.py
                for j in range(k):
                    first = 2 * (left + half) + SUBLANES - p + j
                    pixels = scratch[2 * top + row, pl.ds(first, SUBLANES, stride=2)]
                    for i in range(row % 2, k, 2):
                        if 0 <= row - i < 2 * GROUP:
                            for output in range(2):
                                sums[output][(row - i) // 2] += pixels * wide[(output * k + i) * k + j]
            halves.append(sums)
        here = pl.ds(pl.multiple_of(left, COLUMNS), COLUMNS)
        both = [
            jnp.concatenate([live(jnp.concatenate([sums[output][row] for sums in halves])) for output in range(2)], 1)
            for row in range(GROUP)
        ]
        y[0, pl.ds(top, GROUP), here] = _product(jnp.stack(both).astype(y.dtype), order[...]).astype(y.dtype)

    over_tiles(y.shape, tile)


def _backward(
    above, own, below, x, taps, order, dx, found, scratch, wide, totals, pixels, *, k: int, channels: int
) -> None:
    live = _live(2 * channels, _BOTH)
    for output in range(2):
        mine = order[:, output * LANES : (output + 1) * LANES]
        fill(scratch.at[output], above, own, below, _AROUND, lambda rows, mine=mine: _product(live(rows), mine))
    spread(taps, wide)

    @pl.when(pl.program_id(2) == 0)
    def _():
        totals[...] = jnp.zeros_like(totals)

    def tile(top, left):
        here = pl.ds(2 * top, 2 * GROUP), pl.ds(pl.multiple_of(2 * left, 2 * SUBLANES), 2 * SUBLANES)
        pixels[...] = float32(x[0, *here])
        for a, b in (0, 0), (0, 1), (1, 0), (1, 1):
            phase = pl.ds(a, GROUP, stride=2), pl.ds(b, SUBLANES, stride=2)
            inside = pixels[phase]
            sums = [0.0] * GROUP
            # A pixel's row 2q + a is the row 2o + i - p of an output's window.
            shifts = {i: (a + k // 2 - i) // 2 for i in range(k) if (a + k // 2 - i) % 2 == 0}
            for output in range(2):
                for j in range((b + k // 2) % 2, k, 2):
                    first = left + SUBLANES + (b + k // 2 - j) // 2
                    place = {i: (output * k + i) * k + j for i in shifts}
                    column, products = {i: wide[place[i]] for i in shifts}, dict.fromkeys(shifts, 0.0)
                    for row in range(min(shifts.values()), GROUP + max(shifts.values())):
                        gradient = scratch[output, top + _AROUND + row, pl.ds(first, SUBLANES)]
                        for i, shift in shifts.items():
                            if 0 <= row - shift < GROUP:
                                sums[row - shift] += gradient * column[i]
                                products[i] += gradient * inside[row - shift]
                    for i in shifts:
                        totals[place[i]] += products[i]
            pixels[phase] = jnp.stack(sums)
        dx[0, *here] = pixels[...].astype(dx.dtype)

    over_tiles(own.shape, tile, SUBLANES)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        found[0] = totals[...].sum(1)


def _live(channels: int, lanes: int) -> Callable[[jax.Array], jax.Array]:
    """Returns what makes zeros of the lanes beyond the last channel, which may hold anything."""
    if channels % lanes == 0:
        return lambda x: x
    here = channels - pl.program_id(0) * lanes
    return lambda x: jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < here, x, jnp.zeros_like(x))
