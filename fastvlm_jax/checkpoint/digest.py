"""Computes the digest of an array: the same on every mesh, for any number of processes and any way of storing it.

Each element is mixed with its position in the whole array, and the mixed elements are added up. A sum may be formed in
parts and in any order: each device adds up its own shards where they lie, a host one block of a file after the other.

    element   position   mixed, two words of 32 bits
    1.0       0          87358a80 b1aab1b6
    2.0       1          3174c102 240bcfff
              sum        b8aa4b82 d5b681b5           float32[2] b8aa4b82d5b681b5

At a given position different elements give different words, so that a change of one element is always noticed, and a
change of several is missed in one case of 2**64. The digest finds accidents, not forgeries.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

BLOCK = 2**18  # elements of a file that a host reads at a time
PIECE = 2**14  # elements that a host adds up at a time: they fit the cache of a processor, four times faster than BLOCK
SMALL = 2**20  # bytes of an array that is added up on the host: this takes less time than to compile it
_SPREAD, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


def mix(words, positions):
    """Returns two words for each element, as in the finalizer of MurmurHash3 (Appleby); of NumPy or of JAX.

    Args:
      words: uint32 array; the bits of the elements.
      positions: uint32 array; numbers of the elements in the whole array, row by row, modulo 2**32.
    """
    x = words ^ (positions * _SPREAD)
    x = (x ^ (x >> 16)) * _FIRST
    y = (x ^ (x >> 13)) * _SECOND
    return x, y ^ (y >> 16)


def of_tree(tree: Any) -> tuple[dict[str, str], list[str]]:
    """Returns the digests of a tree of jax.Arrays by name, and the names of arrays with a number that is not finite.

    All processes call it at the same time and get the same result.
    """
    leaves = {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    small = jax.device_get({n: x for n, x in leaves.items() if x.is_fully_replicated and x.nbytes <= SMALL})
    # Each is waited for: of dozens of programs that wait for each other's devices JAX's CPU client never ends some.
    sums = {
        name: _sums_here(small[name]) if name in small else jax.device_get(_compiled(_whole(x.sharding))(x))
        for name, x in leaves.items()
    }
    digests = {name: _text(leaves[name].dtype, leaves[name].shape, s) for name, s in sums.items()}
    return digests, [name for name, s in sums.items() if s[2]]


def name_of(path) -> str:
    """Returns the name under which Orbax stores the array at a path of a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def of_stored(array: tensorstore.TensorStore) -> str:
    """Reads an array block by block and returns its digest."""
    total = np.zeros(2, np.uint32)
    for first, block in blocks(array.shape):
        total += _add_up(array[block].read().result(), first)
    return _text(array.dtype.numpy_dtype, array.shape, total)


def of_parts(read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> str:
    """Returns the digest of an array that is read in parts, those of its leading dimension if it has more than two.

    Args:
      read: index -> that part of the array.
    """
    total, parts = np.zeros(2, np.uint32), shape[0] if len(shape) > 2 else 1
    for i in range(parts):
        index = (slice(i, i + 1),) if len(shape) > 2 else ()
        total += _add_up(read(index), i * math.prod(shape) // parts)
    return _text(dtype, shape, total)


def blocks(shape: tuple[int, ...], limit: int = BLOCK) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yields (position of the first element, index) of blocks of consecutive elements that make up an array.

    Args:
      limit: elements that a block has at most.
    """
    if not shape:
        yield 0, ()
        return
    row = math.prod(shape[1:])
    if row > limit:
        for i in range(shape[0]):
            for first, block in blocks(shape[1:], limit):
                yield i * row + first, (slice(i, i + 1), *block)
        return
    rows = limit // max(row, 1)
    for i in range(0, shape[0], rows):
        yield i * row, (slice(i, min(i + rows, shape[0])), *map(slice, shape[1:]))


def _add_up(x: np.ndarray, first: int = 0) -> np.ndarray:
    """Returns uint32 [2]: both sums of the mixed elements of a block whose first element has the position `first`."""
    x, total = np.ascontiguousarray(x).reshape(-1), np.zeros(2, np.uint32)
    for i in range(0, x.size, PIECE):
        words = x[i : i + PIECE].view(f"u{x.itemsize}").astype(np.uint32)
        positions = np.uint32((first + i) % 2**32) + np.arange(words.size, dtype=np.uint32)
        total += [y.sum(dtype=np.uint32) for y in mix(words, positions)]
    return total


def _sums_here(x: np.ndarray) -> np.ndarray:
    """Returns what `_sums` does, of an array of this host."""
    infinite = jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all()
    return np.append(_add_up(x), np.uint32(infinite))


def _text(dtype, shape, sums) -> str:
    return f"{np.dtype(dtype)}[{','.join(map(str, shape))}] {sums[0]:08x}{sums[1]:08x}"


def _whole(layout: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the sharding of a result that every device of an array's sharding holds whole."""
    named = isinstance(layout, jax.sharding.NamedSharding)
    return jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec()) if named else layout


@functools.cache
def _compiled(layout: jax.sharding.Sharding):
    return jax.jit(_sums, out_shardings=layout)


def _sums(x: jax.Array) -> jax.Array:
    """Returns uint32 [3]: both sums of the mixed elements, and whether one is not finite."""
    words = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    positions, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        positions += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    sums = [jnp.sum(y, dtype=jnp.uint32) for y in mix(words.astype(jnp.uint32), positions)]
    infinite = jnp.issubdtype(x.dtype, jnp.inexact) and ~jnp.isfinite(x).all()
    return jnp.stack([*sums, jnp.uint32(infinite)])
