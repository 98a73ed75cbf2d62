"""The TPU implementation of `mlp`: Pallas kernels that never store the hidden activations in HBM.

    HBM    y [P, C]                                                      + skip [P, C] = result
    VMEM            -- kernel1 --> u [512, 384] -- GELU --> -- kernel2 -->

Legend: P positions, C channels, F = 4 C hidden values, D outputs.

A grid step takes a block of positions, with all weights in VMEM. The backward pass computes u again from y.

Estimates for one v5e, bfloat16, in M cycles (nothing here was measured on a TPU):

| y | forward: XLA | kernel | ratio | backward: XLA | kernel | ratio | matrix units forward, backward |
|---|---|---|---|---|---|---|---|
| 8x256x256x96 | 1.76 | 1.07 | 1.6 | 12.38 | 2.23 | 5.6 | 0.79, 1.77 |
| 8x128x128x192 | 1.11 | 0.80 | 1.4 | 5.99 | 1.77 | 3.4 | 0.79, 1.77 |
| 8x64x64x384 | 0.82 | 0.59 | 1.4 | 3.13 | 1.48 | 2.1 | 0.59, 1.48 |

XLA: the sum of `estimated_cycles` of `mlp.plain` with a skip, alone in its program; backward with u computed again.
Kernel: bundles of the compiler's schedule, one a cycle, times the grid steps, or what the matrix units need if that is
more. Bundles see no stall. The matrix units bind at 192 and 384 channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fastvlm_jax import sharding
from fastvlm_jax.kernels import stacked
from fastvlm_jax.kernels.gelu import phi, value_and_slope

Array = jax.Array
ROWS = (
    512  # positions of a grid step in bfloat16, half of them in float32: the largest kernel just fits the 16 MiB of v4
)
FORWARD_ROWS = 256  # of them, those of one chain of products forward
COLUMNS = 384  # hidden values that exist at a time
MIN_POSITIONS = 4 * ROWS  # a device's; fewer leave nothing to overlap with the loading of the weights
ERF = ("TPU v6", "TPU7x")  # starts of the device kinds that have erf in hardware
VMEM = 100 * 2**20  # bytes


def pays(shape, hidden, outputs):
    """Returns whether the kernels take fewer estimated cycles than XLA's products for maps of a shape [B, H, W, C]."""
    B, H, W, C = shape
    whole = W % 8 == 0 and hidden % 128 == 0  # otherwise XLA copies the maps to flatten them
    return whole and outputs == C and 96 <= C <= 384 and hidden <= 4 * 384 and B * H * W >= MIN_POSITIONS


def exact(dtype):
    """Returns whether the kernels use erf: in float32, and where the TPU of the mesh has it in hardware."""
    return dtype == jnp.float32 or sharding.device_kind().startswith(ERF)


def row(bias):
    """Returns biases [..., F] as the functions below take them: float32 [..., 1, F]."""
    return bias.astype(jnp.float32)[..., None, :]


def forward(y, kernel1, bias1, kernel2, bias2, skip=None, into=None, *, exact=False, interpret=False):
    """Computes gelu(y @ kernel1 + bias1) @ kernel2 + bias2, plus `skip` if it is given, summed in float32.

    Each argument may be a layer of a stack.

    Args:
      y, skip: [P, C] and [P, D], float32 or bfloat16.
      kernel1, bias1, kernel2, bias2: [C, F], [1, F], [F, D], [1, D]; kernels in the dtype of y, biases float32.
      into: the layer of a stack [L, P, D] where the result shall lie.
      exact: whether GELU uses erf instead of tanh; see `gelu.phi`.
      interpret: whether the kernel runs on any platform, slowly.

    Returns:
      [P, D] in the dtype of y; or, with `into`, the stack with that layer replaced.
    """
    like = stacked.shape(y)
    (P, C), (F, D) = like.shape, stacked.shape(kernel2).shape
    target = into or stacked.new(jax.ShapeDtypeStruct((P, D), like.dtype))
    rows = _rows(like)
    layers = [stacked.layer(x) for x in (y, kernel1, bias1, kernel2, bias2, target, *([] if skip is None else [skip]))]
    blocks = pl.BlockSpec((None, rows, C), lambda step, at: (at[0], step, 0))
    weights = [_whole(1, C, F), _whole(2, 1, F), _whole(3, F, D), _whole(4, 1, D)]
    out_spec = pl.BlockSpec((None, rows, D), lambda step, at: (at[5], step, 0))
    skip_spec = pl.BlockSpec((None, rows, D), lambda step, at: (at[6], step, 0))
    out = pl.pallas_call(
        partial(_forward, exact=exact),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(P, rows),),
            in_specs=[blocks, *weights, pl.BlockSpec(memory_space=pl.ANY), None if skip is None else skip_spec],
            out_specs=out_spec,
        ),
        out_shape=jax.ShapeDtypeStruct(target.maps.shape, target.maps.dtype),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(like, F, D, products=2),
        interpret=interpret,
        name="pointwise_block",
    )(stacked.places(*layers), *[each.maps for each in layers], *([None] if skip is None else []))
    return out if into else out[0]


def backward(y, kernel1, bias1, kernel2_DF, kernel1_FC, dout, into=None, *, exact=False, cores=1, interpret=False):
    """Computes the gradients of `forward`; that of `skip` is dout.

    Args:
      y, kernel1, bias1: as in `forward`.
      kernel2_DF, kernel1_FC: the transposed kernels; each may be a layer of a stack.
      dout: [P, D] in the dtype of y, the gradient of the result.
      into: the layers where the sums shall lie, of stacks as `sums` describes them.
      cores: parts of the positions that are summed apart, so that as many cores of a device can share the work.
      others: as in `forward`.

    Returns:
      (gradient of y in its dtype, float32 sums for `gradients`, one for each part; with `into`, their stacks).
    """
    like = stacked.shape(y)
    (P, C), (D, F) = like.shape, stacked.shape(kernel2_DF).shape
    rows = _rows(like)
    steps = pl.cdiv(P, rows)
    targets = into or [stacked.new(each) for each in sums(P, C, F, D, like.dtype, cores)]
    cores = len(targets[0].maps[0])
    layers = [stacked.layer(x) for x in (y, kernel1, bias1, kernel2_DF, kernel1_FC, *targets)]
    y_spec = pl.BlockSpec((None, rows, C), lambda core, step, at: (at[0], core * (steps // cores) + step, 0))
    dy_spec, dout_spec = (
        pl.BlockSpec((rows, width), lambda core, step, at: (core * (steps // cores) + step, 0)) for width in (C, D)
    )
    weights = [_whole(1, C, F), _whole(2, 1, F), _whole(3, D, F), _whole(4, F, C)]
    dy, *found = pl.pallas_call(
        partial(_backward, exact=exact, positions=P),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(cores, steps // cores),
            in_specs=[y_spec, *weights, *[pl.BlockSpec(memory_space=pl.ANY)] * 4, dout_spec],
            out_specs=[dy_spec, *(_part(5 + i, *each.maps.shape[2:]) for i, each in enumerate(targets))],
            scratch_shapes=[pltpu.VMEM((C, rows), like.dtype), pltpu.VMEM((D, rows), like.dtype)],
        ),
        out_shape=[like, *(jax.ShapeDtypeStruct(each.maps.shape, each.maps.dtype) for each in targets)],
        input_output_aliases={6 + i: 1 + i for i in range(4)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=_cost(like, F, D, products=5),
        interpret=interpret,
        name="pointwise_block_gradients",
    )(stacked.places(*layers), *[each.maps for each in layers], dout)
    return dy, tuple(found if into else (each[0] for each in found))


def sums(P, C, F, D, dtype, cores):
    """Describes the sums of `backward` for y [P, C] in a dtype: of kernel1, bias1, kernel2 transposed and bias2."""
    steps = pl.cdiv(P, _rows(jax.ShapeDtypeStruct((P, C), dtype)))
    parts = cores if steps % cores == 0 else 1
    return [jax.ShapeDtypeStruct((parts, *shape), jnp.float32) for shape in ((C, F), (8, F), (D, F), (8, D))]


def gradients(found):
    """Returns the gradients of kernel1, bias1, kernel2 and bias2, [..., C, F] and so on, from `backward`'s sums."""
    dkernel1, dbias1, dkernel2_DF, dbias2 = (jnp.sum(x, axis=-3) for x in found)
    return dkernel1, jnp.sum(dbias1, axis=-2), jnp.swapaxes(dkernel2_DF, -1, -2), jnp.sum(dbias2, axis=-2)


def _forward(_, y_ref, kernel1_ref, bias1_ref, kernel2_ref, bias2_ref, __, skip_ref, out_ref, *, exact):
    for rows in _slices(y_ref.shape[0], FORWARD_ROWS):
        y = y_ref[rows, :]
        out = bias2_ref[...] if skip_ref is None else bias2_ref[...] + skip_ref[rows, :].astype(jnp.float32)
        for hidden in _slices(kernel1_ref.shape[1], COLUMNS):
            u = _product(y, kernel1_ref[:, hidden]) + bias1_ref[:, hidden]
            out += _product((u * phi(u, exact)).astype(y.dtype), kernel2_ref[hidden, :])
        out_ref[rows, :] = out.astype(out_ref.dtype)


def _backward(
    _, y_ref, kernel1_ref, bias1_ref, kernel2_DF_ref, kernel1_FC_ref, _a, _b, _c, _d, dout_ref,
    dy_ref, dkernel1_ref, dbias1_ref, dkernel2_DF_ref, dbias2_ref, y_CR_ref, dout_DR_ref, *, exact, positions,
):  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def clear():
        for ref in (dkernel1_ref, dbias1_ref, dkernel2_DF_ref, dbias2_ref):
            ref[...] = jnp.zeros_like(ref)

    y, dout = (_existing(ref, positions) for ref in (y_ref, dout_ref))
    y_CR_ref[...], dout_DR_ref[...] = y.T, dout.T
    dy = 0.0
    for hidden in _slices(kernel1_ref.shape[1], COLUMNS):
        u = _product(y, kernel1_ref[:, hidden]) + bias1_ref[:, hidden]
        g, slope = value_and_slope(u, exact)
        du = _product(dout, kernel2_DF_ref[:, hidden]) * slope
        dbias1_ref[:, hidden] += _sum_eighths(du)
        g, du = g.astype(y.dtype), du.astype(y.dtype)
        dkernel2_DF_ref[:, hidden] += _product(dout_DR_ref[...], g)
        dkernel1_ref[:, hidden] += _product(y_CR_ref[...], du)
        dy += _product(du, kernel1_FC_ref[hidden, :])
    dbias2_ref[...] += _sum_eighths(dout.astype(jnp.float32))
    dy_ref[...] = dy.astype(dy_ref.dtype)


def _existing(ref, positions):
    """Returns a block, with zeros for what lies behind the last position."""
    rows, width = ref.shape
    if positions % rows == 0:
        return ref[...]
    step = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    position = step * rows + lax.broadcasted_iota(jnp.int32, (rows, width), 0)
    return jnp.where(position < positions, ref[...].astype(jnp.float32), 0).astype(ref.dtype)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _sum_eighths(x):
    """Returns the sums [8, F] of every eighth row, which need no exchange between the rows of a register."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)


def _slices(size, most):
    return [slice(start, min(start + most, size)) for start in range(0, size, most)]


def _rows(y):
    return min(ROWS * 2 // y.dtype.itemsize, -(-y.shape[0] // 16) * 16)


def _whole(place, *shape):
    """Returns how to read a whole matrix, the layer whose number stands at a place of `stacked.places`."""
    return pl.BlockSpec((None, *shape), lambda *ids: (ids[-1][place], 0, 0), pipeline_mode=pl.Buffered(1))


def _part(place, *shape):
    """Returns how to write a core's sum to the layer whose number stands at a place of `stacked.places`."""
    return pl.BlockSpec(
        (None, None, *shape), lambda core, step, at: (at[place], core, 0, 0), pipeline_mode=pl.Buffered(1)
    )


def _cost(y, hidden, outputs, products):
    P, C = y.shape
    return pl.CostEstimate(
        flops=P * hidden * (C + outputs) * products,
        transcendentals=P * hidden * (1 if products == 2 else 2),
        bytes_accessed=(products + 1) * P * C * y.dtype.itemsize,
    )
