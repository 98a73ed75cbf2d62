"""Depthwise convolutions of stride 1 as Pallas kernels for TPU: the forward pass, and both gradients in one kernel.

XLA lays the batch on the sublanes, and takes three to four times the multiply-adds of the vector units. Here a grid step
takes some rows of one image and 128 of its channels. Columns lie on the sublanes, so the batch may have any size:

    HBM   x [B, H, W, C]         rows, those above and those below, 128 channels
    VMEM  float32 [p + rows + p, 8 + W + 8, 128]        p = k // 2; zeros around the image

A shift by columns is a load from another sublane of the scratch, which costs nothing for 32-bit values in a single tile
of lanes. Each load serves all taps of its column, for 8 rows of the result that are summed in registers.

Whoever calls them, calls them on each device's shards.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
_HALO = 4  # rows that are read above and below, of which k // 2 are used
_GROUP = 8  # rows of the result that are summed in registers at a time
_COLUMNS = 16  # columns at a time: a tile of bfloat16
_VMEM = 12 << 20  # most bytes of scratch and blocks; a kernel may take 16 MiB on every generation


def fits(x: jax.Array, kernel: jax.Array) -> bool:
    """Returns whether the kernels take x, [B, H, W, C], and a kernel, [k, k, 1, C], at stride 1."""
    _, height, width, channels = x.shape
    rows, columns, _, outputs = kernel.shape
    square = rows == columns and rows in (3, 5, 7) and outputs == channels
    return square and x.dtype == jnp.bfloat16 and height % _GROUP == 0 and width % _COLUMNS == 0


def forward(x: jax.Array, kernel: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns the zero-padded depthwise convolution of x, which `fits`.

    Args:
      x: [B, H, W, C], bfloat16.
      kernel: [k, k, 1, C].
      interpret: whether to run on a CPU, slowly, for tests.

    Returns:
      [B, H, W, C] in x.dtype, summed in float32.
    """
    batch, height, width, channels = x.shape
    k, rows, blocks = len(kernel), _rows(x, kernel), -(-channels // LANES)
    own = pl.BlockSpec((1, rows, width, LANES), lambda c, b, h: (b, h, 0, c))
    return pl.pallas_call(
        functools.partial(_forward, k=k),
        grid=(blocks, batch, height // rows),
        in_specs=[*_with_halos(own, rows, height), _taps_spec(k)],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(_scratch_shape(rows, width, k), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name=f"depthwise_{k}x{k}",
    )(x, x, x, _taps(kernel))


def backward(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x, in its dtype, and of the kernel, float32 [k, k, 1, C], for a gradient like x."""
    batch, height, width, channels = x.shape
    k, rows, blocks = len(kernel), _rows(x, kernel), -(-channels // LANES)
    own = pl.BlockSpec((1, rows, width, LANES), lambda c, b, h: (b, h, 0, c))
    dx, dtaps = pl.pallas_call(
        functools.partial(_backward, k=k),
        grid=(blocks, batch, height // rows),
        in_specs=[*_with_halos(own, rows, height), own, _taps_spec(k)],
        # A sum for each image, so that two cores may share the images.
        out_specs=[own, pl.BlockSpec((1, k * k, LANES), lambda c, b, h: (b, 0, c))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, k * k, channels), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM(_scratch_shape(rows, width, k), jnp.float32), pltpu.VMEM((k * k, SUBLANES, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=f"depthwise_{k}x{k}_backward",
    )(dy, dy, dy, x, _taps(kernel[::-1, ::-1]))
    # A tap of the flipped kernel joins the same two pixels as the tap opposite of it.
    return dx, dtaps.sum(0).reshape(k, k, 1, channels)[::-1, ::-1]


def _rows(x: jax.Array, kernel: jax.Array) -> int:
    """Returns how many rows a grid step takes: the most that divide the height and leave room in VMEM."""
    _, height, width, _ = x.shape
    return max(
        rows
        for rows in range(_GROUP, min(height, 32) + 1, _GROUP)
        if height % rows == 0 and (rows == _GROUP or _bytes(rows, width, len(kernel)) <= _VMEM)
    )


def _bytes(rows: int, width: int, k: int) -> int:
    """Returns what a step of the backward pass holds: the scratch, and two buffers each of x, dy with its halos, dx."""
    blocks = 2 * (3 * rows + 2 * _HALO) * width * LANES * 2
    return math.prod(_scratch_shape(rows, width, k)) * 4 + blocks


def _scratch_shape(rows: int, width: int, k: int) -> tuple[int, int, int]:
    return rows + k - 1, width + 2 * SUBLANES, LANES


def _with_halos(own: pl.BlockSpec, rows: int, height: int) -> tuple[pl.BlockSpec, ...]:
    """Returns how to read the rows above a grid step's own, its own, and those below; at the border, any others."""
    shape, steps = (1, _HALO, *own.block_shape[2:]), rows // _HALO
    above = pl.BlockSpec(shape, lambda c, b, h: (b, jnp.maximum(h * steps - 1, 0), 0, c))
    below = pl.BlockSpec(shape, lambda c, b, h: (b, jnp.minimum((h + 1) * steps, height // _HALO - 1), 0, c))
    return above, own, below


def _taps(kernel: jax.Array) -> jax.Array:
    """Returns the taps of a kernel as vectors of the chip, float32 [k * k, SUBLANES, C]."""
    taps = kernel.astype(jnp.float32).reshape(-1, 1, kernel.shape[3])
    return jnp.broadcast_to(taps, (len(taps), SUBLANES, taps.shape[2]))


def _taps_spec(k: int) -> pl.BlockSpec:
    return pl.BlockSpec((k * k, SUBLANES, LANES), lambda c, b, h: (0, 0, c))


def _fill(scratch, above, own, below, p: int) -> None:
    """Writes rows to the scratch as float32, with zeros where the image ends."""
    rows, width = own.shape[1:3]
    here = pl.ds(SUBLANES, width)
    sides = jnp.zeros((scratch.shape[0], SUBLANES, LANES), jnp.float32)
    scratch[:, :SUBLANES], scratch[:, SUBLANES + width :] = sides, sides
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    for row in range(p):
        scratch[row, here] = jnp.where(first, 0, above[0, _HALO - p + row].astype(jnp.float32))
        scratch[p + rows + row, here] = jnp.where(last, 0, below[0, row].astype(jnp.float32))

    def copy(row, _):
        scratch[p + row, here] = own[0, row].astype(jnp.float32)

    lax.fori_loop(0, rows, copy, None)


def _over_tiles(shape, tile) -> None:
    """Calls tile(first row, first column) for every _GROUP rows and _COLUMNS columns of a block [1, rows, W, LANES]."""
    _, rows, width, _ = shape

    def group(row, _):
        lax.fori_loop(0, width // _COLUMNS, lambda column, _: tile(row * _GROUP, column * _COLUMNS), None)

    lax.fori_loop(0, rows // _GROUP, group, None)


def _forward(above, own, below, taps, y, scratch, *, k: int) -> None:
    p = k // 2
    _fill(scratch, above, own, below, p)

    def tile(top, left):
        halves = []
        for half in range(0, _COLUMNS, SUBLANES):
            sums = [0.0] * _GROUP
            for j in range(k):
                column = [taps[i * k + j] for i in range(k)]
                for row in range(_GROUP + k - 1):
                    pixels = scratch[top + row, pl.ds(left + half + SUBLANES - p + j, SUBLANES)]
                    for i in _taps_of(row, k):
                        sums[row - i] += pixels * column[i]
            halves.append(sums)
        _store(y, top, left, halves)

    _over_tiles(own.shape, tile)


def _backward(above, own, below, x, taps, dx, dtaps, scratch, sums_of_taps, *, k: int) -> None:
    p = k // 2
    _fill(scratch, above, own, below, p)

    @pl.when(pl.program_id(2) == 0)
    def _():
        sums_of_taps[...] = jnp.zeros_like(sums_of_taps)

    def tile(top, left):
        halves = []
        here = pl.ds(pl.multiple_of(left, _COLUMNS), _COLUMNS)
        inputs = [x[0, top + row, here].astype(jnp.float32) for row in range(_GROUP)]
        for half in range(0, _COLUMNS, SUBLANES):
            sums, inside = [0.0] * _GROUP, [rows[half : half + SUBLANES] for rows in inputs]
            for j in range(k):
                column, products = [taps[i * k + j] for i in range(k)], [0.0] * k
                for row in range(_GROUP + k - 1):
                    pixels = scratch[top + row, pl.ds(left + half + SUBLANES - p + j, SUBLANES)]
                    for i in _taps_of(row, k):
                        sums[row - i] += pixels * column[i]
                        products[i] += pixels * inside[row - i]
                for i in range(k):
                    sums_of_taps[i * k + j] += products[i]
            halves.append(sums)
        _store(dx, top, left, halves)

    _over_tiles(own.shape, tile)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dtaps[0] = sums_of_taps[...].sum(1)


def _taps_of(row: int, k: int) -> range:
    """Returns the rows of taps through which a row of the scratch reaches one of _GROUP rows of the result."""
    return range(max(0, row - _GROUP + 1), min(k, row + 1))


def _store(out, top, left, halves) -> None:
    """Writes the sums of a tile, for both halves of its columns, _GROUP arrays [SUBLANES, LANES]."""
    here = pl.ds(pl.multiple_of(left, _COLUMNS), _COLUMNS)
    for row, parts in enumerate(zip(*halves, strict=True)):
        out[0, top + row, here] = jnp.concatenate(parts).astype(out.dtype)
