"""Depthwise convolutions of stride 1 as Pallas kernels for TPU: the forward pass, and both gradients in one kernel.

XLA lays the batch on the sublanes, which are empty below 8 images, and copies maps between that layout and the one of
matrix products. Here a grid step takes some rows of one image and 128 of its channels. Columns lie on the sublanes, as
in products, and the batch may have any size. docs/kernels.md compares the two, by two counts that disagree.

    HBM   x [B, H, W, C]         rows, those above and those below, 128 channels
    VMEM  float32 [p + rows + p, 8 + W + 8, 128]        p = k // 2; zeros around the image

A shift by columns is a load from another sublane of the scratch, which costs nothing for 32-bit values in a single tile
of lanes. Each load serves all taps of its column, for 8 rows of the result that are summed in registers.

Maps may be layers of a stack, which a kernel reads and writes where they lie: see stacked.py. Whoever calls the
functions calls them on each device's shards.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fastvlm_jax.kernels import stacked
from fastvlm_jax.kernels.stacked import Layer

LANES, SUBLANES = 128, 8
GROUP = 8  # rows of the result that are summed in registers at a time
COLUMNS = 16  # columns at a time: a tile of bfloat16
_VMEM = 12 << 20  # most bytes of scratch and blocks; a kernel may take 16 MiB on every generation


def fits(x: jax.Array, kernel: jax.Array) -> bool:
    """Returns whether the kernels take x, [B, H, W, C], and a kernel, [k, k, 1, C], at stride 1."""
    _, height, width, channels = x.shape
    rows, columns, _, outputs = kernel.shape
    square = rows == columns and rows in (3, 5, 7) and outputs == channels
    return square and x.dtype == jnp.bfloat16 and height % GROUP == 0 and width % COLUMNS == 0


def taps(kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Returns kernels [..., k, k, 1, C] and biases [..., C], or 0, as the functions below take them.

    Returns:
      float32 [..., k * k + 1, C], the bias last.
    """
    *stack, k, _, _, C = kernel.shape
    bias = jnp.zeros((*stack, C)) if bias is None else bias
    parts = kernel.reshape(*stack, k * k, C), bias[..., None, :]
    return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=-2)


def kernel_and_bias(taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the kernels [..., k, k, 1, C] and biases [..., C] of `taps`."""
    *stack, size, C = taps.shape
    k = math.isqrt(size - 1)
    return taps[..., :-1, :].reshape(*stack, k, k, 1, C), taps[..., -1, :]


def forward(
    x: jax.Array | Layer, taps: jax.Array | Layer, into: Layer | None = None, interpret: bool = False
) -> jax.Array:
    """Returns the zero-padded depthwise convolution of x, which `fits`, with its bias.

    Args:
      x: [B, H, W, C], bfloat16.
      taps: float32 [k * k + 1, C], see `taps`.
      into: the layer of a stack where the result shall lie.
      interpret: whether to run on a CPU, slowly, for tests.

    Returns:
      [B, H, W, C] in x.dtype, summed in float32; or, with `into`, the stack with that layer replaced.
    """
    like, source, weights = stacked.shape(x), stacked.layer(x), stacked.layer(taps)
    target = into or stacked.new(like)
    (batch, height, width, channels), size = like.shape, weights.maps.shape[1]
    k, rows = math.isqrt(size), _rows(like, size)
    out = pl.pallas_call(
        functools.partial(_forward, k=k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-channels // LANES), batch, height // rows),
            in_specs=[
                *with_halos(k // 2, 0, rows, height, width),
                _taps_spec(1, size),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=_own(2, rows, width),
            scratch_shapes=[vmem(padded(rows + k - 1, width)), vmem((size, SUBLANES, LANES))],
        ),
        out_shape=jax.ShapeDtypeStruct(target.maps.shape, target.maps.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name=f"depthwise_{k}x{k}",
    )(stacked.places(source, weights, target), *[source.maps] * 3, weights.maps, target.maps)
    return out if into else out[0]


def backward(
    x: jax.Array | Layer,
    taps: jax.Array | Layer,
    dy: jax.Array,
    plus: jax.Array | None = None,
    into: Layer | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x, in its dtype, and of the taps, float32 [B, k * k + 1, C], one for each image.

    Args:
      x, taps: as in `forward`.
      dy: [B, H, W, C] in the dtype of x.
      plus: another gradient of x that is added to its own.
      into: the layer of a stack [L, B, k * k + 1, C] where the taps' gradient shall lie; the stack is returned then.
    """
    like, source, weights = stacked.shape(x), stacked.layer(x), stacked.layer(taps)
    (batch, height, width, channels), size = like.shape, weights.maps.shape[1]
    k, rows = math.isqrt(size), _rows(like, size)
    # A sum for each image, so that two cores may share the images.
    target = into or stacked.new(jax.ShapeDtypeStruct((batch, size, channels), jnp.float32))
    own = pl.BlockSpec((1, rows, width, LANES), lambda c, b, h, at: (b, h, 0, c))
    wide = vmem((size, SUBLANES, LANES))
    dx, found = pl.pallas_call(
        functools.partial(_backward, k=k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-channels // LANES), batch, height // rows),
            in_specs=[
                *with_halos(k // 2, None, rows, height, width),
                _own(0, rows, width),
                _taps_spec(1, size),
                pl.BlockSpec(memory_space=pl.ANY),
                None if plus is None else own,
            ],
            out_specs=[own, pl.BlockSpec((None, 1, size, LANES), lambda c, b, h, at: (at[2], b, 0, c))],
            scratch_shapes=[vmem(padded(rows + k - 1, width)), wide, wide],
        ),
        out_shape=[like, jax.ShapeDtypeStruct(target.maps.shape, target.maps.dtype)],
        input_output_aliases={6: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=f"depthwise_{k}x{k}_backward",
    )(stacked.places(source, weights, target), dy, dy, dy, source.maps, weights.maps, target.maps, plus)
    return dx, found if into else found[0]


def _rows(x: jax.ShapeDtypeStruct, size: int) -> int:
    """Returns how many rows a grid step takes, forward and backward."""
    _, height, width, _ = x.shape
    k = math.isqrt(size)
    return rows_that_fit(height, lambda rows: held(rows + k - 1, 3 * rows + 2 * halo(k // 2), width))


def rows_that_fit(height: int, held: Callable[[int], int]) -> int:
    """Returns how many rows of its result a grid step takes: the most that divide the height and leave room in VMEM.

    Args:
      held: function of such a number that returns what the step holds, in bytes.
    """
    possible = [rows for rows in range(GROUP, min(height, 32) + 1, GROUP) if height % rows == 0]
    return max(rows for rows in possible if rows == GROUP or held(rows) <= _VMEM)


def held(scratch_rows: int, block_rows: int, width: int) -> int:
    """Returns the bytes of a float32 scratch of padded rows, and of two buffers each of bfloat16 blocks."""
    return math.prod(padded(scratch_rows, width)) * 4 + 2 * block_rows * width * LANES * 2


def padded(rows: int, width: int) -> tuple[int, int, int]:
    """Returns the shape of rows in the scratch: a tile of zeros on both sides."""
    return rows, width + 2 * SUBLANES, LANES


def _own(place: int, rows: int, width: int) -> pl.BlockSpec:
    """Returns how to read or write a grid step's own rows of the layer whose number stands at a place of `places`."""
    return pl.BlockSpec((None, 1, rows, width, LANES), lambda c, b, h, at: (at[place], b, h, 0, c))


def halo(p: int) -> int:
    """Returns how many rows are read above and below, of which p are used: a number that divides GROUP."""
    return 1 << (p - 1).bit_length()


def with_halos(
    p: int, place: int | None, rows: int, height: int, width: int, lanes: int = LANES
) -> tuple[pl.BlockSpec, ...]:
    """Returns how to read the rows above a grid step's own, its own, and those below; at the border, any others.

    Of those above and below p are used. Without a place the maps are no stack.
    """
    around = halo(p)
    steps = rows // around

    def spec(size, first_row):
        if place is None:
            return pl.BlockSpec((1, size, width, lanes), lambda c, b, h, *_: (b, first_row(h), 0, c))
        return pl.BlockSpec((None, 1, size, width, LANES), lambda c, b, h, at: (at[place], b, first_row(h), 0, c))

    above = spec(around, lambda h: jnp.maximum(h * steps - 1, 0))
    below = spec(around, lambda h: jnp.minimum((h + 1) * steps, height // around - 1))
    return above, spec(rows, lambda h: h), below


def _taps_spec(place: int, size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size, LANES), lambda c, b, h, at: (at[place], 0, c))


def vmem(shape: tuple[int, ...]):
    return pltpu.VMEM(shape, jnp.float32)


def spread(taps, wide) -> None:
    """Writes each tap to all sublanes of a vector of its own."""
    wide[...] = jnp.broadcast_to(taps[...][:, None], wide.shape)


def float32(rows: jax.Array) -> jax.Array:
    return rows.astype(jnp.float32)


def fill(scratch, above, own, below, p: int, values: Callable[[jax.Array], jax.Array] = float32) -> None:
    """Writes the values of rows, float32, to the scratch, with zeros where the image ends."""
    rows, width = own.shape[1:3]
    here = pl.ds(SUBLANES, width)
    sides = jnp.zeros((scratch.shape[0], SUBLANES, LANES), jnp.float32)
    scratch[:, :SUBLANES], scratch[:, SUBLANES + width :] = sides, sides
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    scratch[:p, here] = jnp.where(first, 0, values(above[0, above.shape[1] - p :]))
    scratch[p + rows :, here] = jnp.where(last, 0, values(below[0, :p]))

    def copy(group, _):
        scratch[pl.ds(p + group * GROUP, GROUP), here] = values(own[0, pl.ds(group * GROUP, GROUP)])

    lax.fori_loop(0, rows // GROUP, copy, None)


def over_tiles(shape, tile, columns: int = COLUMNS) -> None:
    """Calls tile(first row, first column) for every GROUP rows and some columns of a block [1, rows, W, C]."""
    _, rows, width, _ = shape

    def group(row, _):
        lax.fori_loop(0, width // columns, lambda column, _: tile(row * GROUP, column * columns), None)

    lax.fori_loop(0, rows // GROUP, group, None)


def _forward(_, above, own, below, taps, __, y, scratch, wide, *, k: int) -> None:
    p = k // 2
    fill(scratch, above, own, below, p)
    spread(taps, wide)

    def tile(top, left):
        here = pl.ds(pl.multiple_of(left, COLUMNS), COLUMNS)
        halves = range(0, COLUMNS, SUBLANES)
        sums = {half: [wide[k * k]] * GROUP for half in halves}
        # Row by row, so that only k sums of a half are in registers: the scheduler moves loads, but no sums.
        for row in range(GROUP + k - 1):
            for half in halves:
                for j in range(k):
                    pixels = scratch[top + row, pl.ds(left + half + SUBLANES - p + j, SUBLANES)]
                    for i in _taps_of(row, k):
                        sums[half][row - i] += pixels * wide[i * k + j]
            if row >= k - 1:
                done = row - k + 1
                y[0, top + done, here] = jnp.concatenate([sums[half][done] for half in halves]).astype(y.dtype)

    over_tiles(own.shape, tile)


def _backward(_, above, own, below, x, taps, __, plus, dx, found, scratch, wide, totals, *, k: int) -> None:
    p = k // 2
    fill(scratch, above, own, below, p)
    spread(taps, wide)

    @pl.when(pl.program_id(2) == 0)
    def _():
        totals[...] = jnp.zeros_like(totals)

    def tile(top, left):
        halves = []
        here = pl.ds(pl.multiple_of(left, COLUMNS), COLUMNS)
        inputs, added = (
            None if ref is None else [ref[0, top + row, here].astype(jnp.float32) for row in range(GROUP)]
            for ref in (x, plus)
        )
        for half in range(0, COLUMNS, SUBLANES):
            inside = [rows[half : half + SUBLANES] for rows in inputs]
            bias = 0.0
            sums = [0.0] * GROUP if added is None else [rows[half : half + SUBLANES] for rows in added]
            for j in range(k):
                places = [(k - 1 - i) * k + k - 1 - j for i in range(k)]  # of the flipped kernel
                column, products = [wide[place] for place in places], [0.0] * k
                for row in range(GROUP + k - 1):
                    pixels = scratch[top + row, pl.ds(left + half + SUBLANES - p + j, SUBLANES)]
                    for i in _taps_of(row, k):
                        sums[row - i] += pixels * column[i]
                        products[i] += pixels * inside[row - i]
                    if j == p and p <= row < p + GROUP:
                        bias = bias + pixels
                for place, product in zip(places, products, strict=True):
                    totals[place] += product
            totals[k * k] += bias
            halves.append(sums)
        for row, parts in enumerate(zip(*halves, strict=True)):
            dx[0, top + row, here] = jnp.concatenate(parts).astype(dx.dtype)

    over_tiles(own.shape, tile)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        found[0] = totals[...].sum(1)


def _taps_of(row: int, k: int) -> range:
    """Returns the rows of taps through which a row of the scratch reaches one of GROUP rows of the result."""
    return range(max(0, row - GROUP + 1), min(k, row + 1))
