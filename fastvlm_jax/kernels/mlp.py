"""A perceptron of every position, fc1, GELU and fc2: one function, with the form that is fastest on each platform.

| platform | form | reason |
|---|---|---|
| TPU, large maps of 96 to 384 channels | `pointwise_block_tpu` | the hidden values are never stored |
| CPU, forward, large maps | `plain` for blocks of rows, in a loop | the hidden values of a block stay in the cache |
| all others | `plain` | nothing faster is available |

At 128x128x192 a CPU takes a quarter less time in blocks, at 32x32x384 the same.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fastvlm_jax.kernels import choice, pointwise_block_tpu
from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.sharding import device_cores, images_here, map_axes, on_shards, sum_batch

MAX_HIDDEN = 2**20  # hidden values of a block of rows: 4 MB in float32
MIN_POSITIONS = 256  # with fewer in a block its matrix products are slower
WEIGHT_AXES = ((None, None), (None,), (None, None), (None,))  # logical axes: every device has all weights


def mlp(x, kernel1, bias1, kernel2, bias2, skip=None, *, kernels="auto"):
    """Computes gelu(x @ kernel1 + bias1) @ kernel2 + bias2, and adds `skip` if it is given.

    For maps that the TPU kernels take, the backward pass computes the hidden values again, whatever a checkpoint policy
    says. Only first derivatives are supported then.

    Args:
      x: maps [B, H, W, C].
      kernel1, bias1, kernel2, bias2: [C, F], [F], [F, D], [D] in the dtype of x.
      skip: [B, H, W, D] in the dtype of x.
      kernels: whether the TPU kernels are used, see choice.py.

    Returns:
      [B, H, W, D] in the dtype of x.
    """
    shape = (images_here(len(x)), *x.shape[1:])
    args = (x, kernel1, bias1, kernel2, bias2, skip)
    if choice.used(kernels) and pointwise_block_tpu.pays(shape, kernel1.shape[1], kernel2.shape[1]):
        return on_tpu(*args, kernels == "interpret")
    y = _branch(*args[:5])
    return y if skip is None else skip + y


def plain(x, kernel1, bias1, kernel2, bias2, skip=None):
    """Computes `mlp` in plain JAX."""
    y = gelu(x @ kernel1 + bias1) @ kernel2 + bias2
    return y if skip is None else skip + y


@jax.custom_vjp
def _branch(x, kernel1, bias1, kernel2, bias2):
    args = (x, kernel1, bias1, kernel2, bias2)
    rows = rows_at_once(x.shape, kernel1.shape[1])
    if rows == x.shape[1]:
        return plain(*args)
    return lax.platform_dependent(*args, cpu=functools.partial(_in_blocks, rows), default=plain)


_branch.defvjp(lambda *args: jax.vjp(plain, *args), lambda vjp, dy: vjp(dy))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def on_tpu(x, kernel1, bias1, kernel2, bias2, skip=None, interpret=False):
    """Computes `mlp` with the TPU kernel, each device for its own images; `interpret` runs it anywhere, slowly."""
    exact = pointwise_block_tpu.exact(x.dtype)

    def local(x, skip, *weights):
        skip_PD = None if skip is None else _positions(skip)
        kernel1, bias1, kernel2, bias2 = weights
        rows = pointwise_block_tpu.row(bias1), pointwise_block_tpu.row(bias2)
        y_PD = pointwise_block_tpu.forward(
            _positions(x), kernel1, rows[0], kernel2, rows[1], skip_PD, exact=exact, interpret=interpret
        )
        return y_PD.reshape(*x.shape[:3], -1)

    maps = map_axes(len(x))
    axes = [maps, None if skip is None else maps, *WEIGHT_AXES]
    return on_shards(local, axes, maps)(x, skip, kernel1, bias1, kernel2, bias2)


def _on_tpu_backward(interpret, args, dy):
    x, kernel1, bias1, kernel2, _, skip = args
    target = dict(exact=pointwise_block_tpu.exact(x.dtype), cores=device_cores())
    maps = map_axes(len(x))

    def local(x, dy, kernel1, bias1, kernel2):
        weights = kernel1, pointwise_block_tpu.row(bias1), kernel2.T, kernel1.T
        dx_PC, sums = pointwise_block_tpu.backward(
            _positions(x), *weights, _positions(dy), **target, interpret=interpret
        )
        found = [gradient.astype(x.dtype) for gradient in pointwise_block_tpu.gradients(sums)]
        return dx_PC.reshape(x.shape), *(map(sum_batch, found) if maps[0] else found)

    in_axes, out_axes = [maps, maps, *WEIGHT_AXES[:3]], (maps, *WEIGHT_AXES)
    gradients = on_shards(local, in_axes, out_axes)(x, dy, kernel1, bias1, kernel2)
    return *gradients, None if skip is None else dy


on_tpu.defvjp(lambda *args: (on_tpu(*args), args[:6]), _on_tpu_backward)


def _positions(x):
    return x.reshape(-1, x.shape[-1])


def rows_at_once(shape, hidden):
    """Returns the rows of a block, a divisor of H: H itself where blocks do not pay."""
    batch, height, width, _ = shape
    if batch * height * width * hidden <= 2 * MAX_HIDDEN:
        return height
    return divisor(height, MAX_HIDDEN // (batch * width * hidden), MIN_POSITIONS / (batch * width))


def divisor(n, most, least):
    """Returns the largest divisor of n up to `most`, or n itself if that divisor is below `least`."""
    found = max((d for d in range(1, n + 1) if n % d == 0 and d <= most), default=0)
    return found if found >= least else n


def _in_blocks(rows, x, *weights):
    def add(i, y):
        part = lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
        return lax.dynamic_update_slice_in_dim(y, plain(part, *weights), i * rows, axis=1)

    y = jnp.zeros((*x.shape[:3], weights[2].shape[1]), x.dtype)
    return lax.fori_loop(0, x.shape[1] // rows, add, y)
