"""What BatchNorm in training form does with whole maps, as Pallas kernels for TPU: sums over positions, and their use.

By the compiler's estimate, XLA's own reductions to channels take five to ten times as long as reading the maps from
HBM; by the schedules that it writes for them, they do not (docs/kernels.md). Here a grid step takes some positions of
one image with all channels, and adds them up eighth by eighth, which moves nothing within a register.

Maps may be layers of a stack, which a kernel reads where they lie: see stacked.py. Whoever calls the functions calls
them on each device's shards.

Legend: B images, P positions of an image, C channels.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fastvlm_jax.kernels import stacked
from fastvlm_jax.kernels.depthwise_tpu import SUBLANES
from fastvlm_jax.kernels.stacked import Layer

Maps = jax.Array | Layer
BLOCK = 2**18  # most values of a map that a grid step reads
CHUNK = 2**13  # most values of a map that are in registers at a time
ROWS = 16  # positions of a tile of bfloat16


def fits(x: jax.Array) -> bool:
    """Returns whether the kernels take maps x, [B, H, W, C]: flattened to positions, they are not copied.

    Maps of fewer than four tiles of positions are left to XLA.
    """
    _, H, W, _ = x.shape
    return W % ROWS == 0 and (H * W) % (4 * ROWS) == 0 and x.dtype in (jnp.bfloat16, jnp.float32)


def moments(x: Maps, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the biased variance of each channel over the positions of each image, float32 [B, C].

    The squares are of differences from values of the same channel: few digits are lost where a mean is large.

    Args:
      x: [B, H, W, C], which `fits`.
      interpret: whether to run on a CPU, slowly, for tests.
    """
    found_BS2C = _call(_moments, [x], [], "moments", interpret, each_step=True, sums=2)
    means, variances = found_BS2C[:, :, 0], found_BS2C[:, :, 1]
    mean = jnp.mean(means, axis=1)
    return mean, jnp.mean(variances + jnp.square(means - mean[:, None]), axis=1)


def products(xs: Sequence[Maps], dy: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns the sums over the positions of each image of dy times each of xs, and of dy: float32 [B, len(xs) + 1, C].

    Args:
      xs, dy: [B, H, W, C] each, which `fits`.
      interpret: as in `moments`.
    """
    return _call(_products, [*xs, dy], [], "products", interpret, sums=len(xs) + 1)


def weighted_sum(xs: Sequence[Maps], factors: Sequence[jax.Array], shift: jax.Array, interpret: bool = False):
    """Returns the sum of maps [B, H, W, C], which `fits`, each times its factor, plus a shift, both float32 [B, C]."""
    return _call(_weighted_sum, xs, [*factors, shift], "weighted_sum", interpret)


def _call(
    kernel: Callable, maps: Sequence[Maps], weights: Sequence[jax.Array], name: str, interpret: bool,
    *, sums: int = 0, each_step: bool = False,
) -> jax.Array:  # fmt: skip
    """Runs a kernel over the positions of maps, with weights [B, C].

    Returns:
      [B, sums, C] in float32, or [B, steps, sums, C] with `each_step`; without `sums`, maps like the first.
    """
    like, layers = stacked.shape(maps[0]), [stacked.layer(x) for x in maps]
    (B, *_, C), P = like.shape, like.shape[1] * like.shape[2]
    positions = _most(P, BLOCK // C)
    steps = P // positions
    blocks = [pl.BlockSpec((None, None, positions, C), _at(place)) for place in range(len(maps))]
    rows = pl.BlockSpec((None, 1, C), lambda b, step, at: (b, 0, 0))
    if each_step:
        out = jax.ShapeDtypeStruct((B, steps, sums, C), jnp.float32)
        out_spec = pl.BlockSpec((None, None, sums, C), lambda b, step, at: (b, step, 0, 0))
    elif sums:
        out = jax.ShapeDtypeStruct((B, sums, C), jnp.float32)
        out_spec = pl.BlockSpec((None, sums, C), lambda b, step, at: (b, 0, 0))
    else:
        out = jax.ShapeDtypeStruct((B, P, C), like.dtype)
        out_spec = pl.BlockSpec((None, positions, C), lambda b, step, at: (b, step, 0))
    size = B * P * C
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(B, steps), in_specs=[*blocks, *[rows] * len(weights)], out_specs=out_spec
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if sums and not each_step else "parallel")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * size * max(sums, len(maps)),
            transcendentals=0,
            bytes_accessed=size * like.dtype.itemsize * (len(maps) + (not sums)),
        ),
        interpret=interpret,
        name=name,
    )(
        stacked.places(*layers),
        *[each.maps.reshape(len(each.maps), B, P, C) for each in layers],
        *[weight[:, None] for weight in weights],
    )
    return found if sums else found.reshape(like.shape)


def _at(place: int) -> Callable:
    return lambda b, step, at: (at[place], b, step, 0)


def _most(size: int, most: int) -> int:
    """Returns the most positions, up to `most`, that divide `size` in whole tiles; one tile at least."""
    return max(n for n in range(ROWS, size + 1, ROWS) if size % n == 0 and (n <= most or n == ROWS))


def _moments(_, x, out) -> None:
    near = jnp.mean(_float32(x, pl.ds(0, ROWS)), axis=0, keepdims=True)

    def differences(x):
        difference = x - near
        return [difference, jnp.square(difference)]

    mean, squares = (total / x.shape[0] for total in _totals(differences, x))
    out[:1], out[1:] = near + mean, squares - jnp.square(mean)


def _products(_, *refs) -> None:
    *maps, out = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    for i, total in enumerate(_totals(lambda *values: [*(x * values[-1] for x in values[:-1]), values[-1]], *maps)):
        out[i : i + 1] += total


def _weighted_sum(_, *refs) -> None:
    *refs, out = refs
    count = len(refs) // 2
    xs, factors, shift = refs[:count], [ref[...] for ref in refs[count:-1]], refs[-1][...]

    def add(here):
        values = (_float32(x, here) * factor for x, factor in zip(xs, factors, strict=True))
        out[here] = (sum(values) + shift).astype(out.dtype)

    _over_chunks(out.shape, lambda here, _: add(here), None)


def _totals(function: Callable, *refs) -> list[jax.Array]:
    """Returns the sums over the positions of what a function makes of blocks [positions, C]: float32 [1, C] each."""
    C = refs[0].shape[1]
    like = jax.eval_shape(function, *[jax.ShapeDtypeStruct((SUBLANES, C), jnp.float32)] * len(refs))

    def add(here, totals):
        found = function(*[_float32(ref, here) for ref in refs])
        return [
            total + jnp.sum(values.reshape(-1, SUBLANES, C), axis=0)
            for total, values in zip(totals, found, strict=True)
        ]

    totals = _over_chunks(refs[0].shape, add, [jnp.zeros((SUBLANES, C), jnp.float32) for _ in like])
    return [jnp.sum(total, axis=0, keepdims=True) for total in totals]


def _over_chunks(shape: tuple[int, int], function: Callable, carry):
    """Returns the carry after calls of function(positions of a chunk, carry) for a block [positions, C]."""
    positions, C = shape
    rows = _most(positions, CHUNK // C)
    return lax.fori_loop(0, positions // rows, lambda i, carry: function(pl.ds(i * rows, rows), carry), carry)


def _float32(ref, here) -> jax.Array:
    return ref[here].astype(jnp.float32)
