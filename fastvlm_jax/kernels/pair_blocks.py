"""Runs over the logits of B images and B texts block by block, without a B x B matrix on any device.

A device holds the images and texts of its b pairs. The logits of its images and of all texts come block by block, and
each block is used for both directions before it is dropped: over its rows, an image looks for its text, and over its
columns, a text looks for its image.

                     texts of device 0    texts of device 1
    images of 0      block  block  ...    block  block  ...     device 0
    images of 1      block  block  ...    block  block  ...     device 1

The texts of the other devices are gathered at once (memory grows with B), or move around a ring, one device's at a time
(it does not).

Legend: B pairs of the batch, b pairs of a device, D width of the features; R rows and C columns of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fastvlm_jax import sharding

Array = jax.Array
PAIRS, ALL = ("batch",), ()  # logical axes of arrays with one entry a pair, and of what every device holds whole
LOGITS = 2**21  # of a block: on a TPU fewer columns cost time, because each block moves the sums of its rows


def over_texts(body, carry, fixed: Any, empty, merge, block: int, ring: bool):
    """Runs over the texts of all devices, block by block; returns (carry, results of this device's texts).

    Args:
      body: (carry, fixed, results) -> (carry, results) of a block of columns.
      fixed: arrays with one entry for each text of this device.
      empty: number of texts -> their results before the first block.
      merge: results that each device has of all texts -> the results of this device's texts over all rows.
    """
    if not ring:
        gathered = jax.tree.map(sharding.gather_batch, fixed)
        carry, results = _in_blocks(body, carry, gathered, empty(_length(gathered)), block)
        return carry, merge(results)

    def turn(state, _):
        carry, fixed, results = state
        carry, results = _in_blocks(body, carry, fixed, results, block)
        return (carry, *jax.tree.map(sharding.pass_on, (fixed, results))), None

    state = (carry, fixed, empty(_length(fixed)))
    (carry, _, results), _ = jax.lax.scan(turn, state, length=sharding.batch_shards())
    return carry, results


def columns_of(block: int, rows: int) -> int:
    """Returns the columns of a block: `block`, or for 0 as many as make LOGITS with this number of rows."""
    return block or max(LOGITS // rows, 1)


def wide(x: Array):
    """Returns the dtype in which products of x are added up: float32, or float64 for float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def product(equation: str, *factors: Array) -> Array:
    """Returns the product of an einsum `equation`, in the narrowest dtype of the factors, added up in a wide one."""
    dtype = min((x.dtype for x in factors), key=lambda dtype: dtype.itemsize)
    return jnp.einsum(equation, *(x.astype(dtype) for x in factors), preferred_element_type=wide(factors[0]))


def logits(x: Array, y: Array, scale: Array | float) -> Array:
    """Returns the logits [R, C] of images [R, D] and texts [C, D]."""
    return scale * product("rd,cd->rc", x, y)


def _in_blocks(body, carry, fixed, results, block: int):
    """Runs `body` over blocks of columns, the last of which may be smaller; returns (carry, results)."""
    columns, count = (fixed, results), _length(fixed)
    whole = count // block * block

    def step(carry, columns):
        return body(carry, *columns)

    done = []
    if whole:
        blocks = jax.tree.map(lambda x: x[:whole].reshape(whole // block, block, *x.shape[1:]), columns)
        carry, out = jax.lax.scan(step, carry, blocks)
        done.append(jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out))
    if whole < count:
        carry, out = step(carry, jax.tree.map(lambda x: x[whole:], columns))
        done.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)


def _length(tree: Any) -> int:
    return len(jax.tree.leaves(tree)[0])
