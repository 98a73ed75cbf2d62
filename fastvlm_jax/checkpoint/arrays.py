"""Reads the arrays of a checkpoint: the shards of a mesh, or part by part on a host. Damaged arrays are named.

Orbax stores every array in TensorStore's format under its name, its path joined by dots. It is not Orbax that reads
them, because its reading has barriers: a process that found damage would leave the others waiting there.
"""

import concurrent.futures
import contextlib
import math
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore

from fastvlm_jax.checkpoint import digest
from fastvlm_jax.checkpoint.folder import Damaged, read_notes
from fastvlm_jax.convert.mapping import SAME, Leaf

# Memory for chunks of which parts are still to be read: a chunk may hold all layers, or shards of several devices.
CACHE_BYTES = 8_000_000_000
THREADS = min(2 * (os.cpu_count() or 1), 16)  # arrays that are read at a time: each is in the host's memory meanwhile


class StoredArray:
    """Holds an array of a checkpoint. It is read whole and compared with its digest before its first part is read."""

    def __init__(self, folder: pathlib.Path, part: str, name: str, context: tensorstore.Context, expected: str | None):
        """Opens an array.

        Args:
          folder: folder of the checkpoint.
          part: "model" or "training".
          name: its name.
          context: cache that it shares with others, see `make_cache`.
          expected: its digest; None if none was stored.

        Raises:
          Damaged: it is missing, or its description is not readable.
        """
        self._place, self._expected, self._lock = (folder, part, name), expected, threading.Lock()
        spec = {"driver": "zarr3", "kvstore": _kvstore(folder, part, f"{name}/"), "fill_missing_data_reads": False}
        with _blaming(*self._place):
            self._array = tensorstore.open(spec, open=True, read=True, context=context).result()
        self.shape, self.dtype = self._array.shape, np.dtype(self._array.dtype.numpy_dtype)
        chunk = math.prod(self._array.chunk_layout.write_chunk.shape or (1,))
        # A chunk is unpacked whole: one that is larger than the array could ask for any amount of memory.
        if chunk > max(math.prod(self.shape), 1) or chunk * self.dtype.itemsize > CACHE_BYTES:
            raise Damaged(folder, f"{part} array {name} of {self.shape} is said to lie in chunks of {chunk:,} elements")

    def __getitem__(self, index) -> np.ndarray:
        with self._lock:
            if self._expected is not None:
                self.prove()
                self._expected = None
        return self.read(index)

    def read(self, index) -> np.ndarray:
        """Reads a part of the array, which is not compared with its digest.

        Raises:
          Damaged: it is not readable.
        """
        with _blaming(*self._place):
            return self._array[index].read().result()

    def prove(self) -> None:
        """Reads the whole array, and compares it with its digest if there is one.

        Raises:
          Damaged: it is not readable or has another digest.
        """
        with _blaming(*self._place):
            found = digest.of_stored(self._array)
        if self._expected not in (None, found):
            raise differs(*self._place)


def make_cache() -> tensorstore.Context:
    """Returns a cache for the arrays of a checkpoint, which share it."""
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def differs(folder: pathlib.Path, part: str, name: str) -> Damaged:
    """Returns the error for an array that can be read and is not what was saved."""
    return Damaged(folder, f"{part} array {name} is not what was saved")


def names_of(folder: pathlib.Path, part: str) -> list[str]:
    """Returns the names of all arrays of a part of a checkpoint.

    Raises:
      Damaged: they cannot be listed.
    """
    with _blaming(folder, part, "names"):
        keys = tensorstore.KvStore.open(_kvstore(folder, part)).result().list().result()
    return [key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")]


def load_shards(folder: pathlib.Path, part: str, target: Any) -> Any:
    """Reads a part of a checkpoint as jax.Arrays. Each process reads the shards of its own devices.

    Args:
      target: its tree of ShapeDtypeStructs with shardings.

    Raises:
      Damaged: an array is missing, not readable, or of another shape or dtype. Digests are not looked at.
    """
    cache = make_cache()

    def load(leaf) -> jax.Array:
        path, x = leaf
        name = digest.name_of(path)
        array = StoredArray(folder, part, name, cache, None)
        if (array.shape, array.dtype) != (x.shape, x.dtype):
            found, wanted = (f"{y.dtype}{list(y.shape)}" for y in (array, x))
            raise Damaged(folder, f"{part} array {name} is {found} and the run asks for {wanted}")
        return jax.make_array_from_callback(x.shape, x.sharding, array.read)

    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return jax.tree.unflatten(structure, pool.map(load, leaves))


def load_variables(folder: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Opens the parameters and batch statistics of a checkpoint as Leaves, which are read when they are used.

    Args:
      folder: folder of the checkpoint.
      abstract: the model's variables as ShapeDtypeStructs.

    Raises:
      Damaged: an array is missing or not readable. Reading a Leaf raises it too, if the array has another digest.
      ValueError: an array is of another shape; the message names it.
    """
    digests, cache = read_notes(folder)["digests"] or {"model": {}}, make_cache()

    def leaf(path, x) -> Leaf:
        name = digest.name_of(path)
        array = StoredArray(folder, "model", name, cache, digests["model"].get(name))
        if array.shape != x.shape:
            raise ValueError(f"{folder}: {name} has shape {array.shape}, its config.json asks for {x.shape}")
        return Leaf((array,), SAME, x.shape, array.dtype, stacked=False)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _kvstore(folder: pathlib.Path, part: str, path: str = "") -> dict[str, Any]:
    base = {"driver": "file", "path": f"{(folder / part).absolute()}/"}
    return {"driver": "ocdbt", "base": base, "path": path}


@contextlib.contextmanager
def _blaming(folder: pathlib.Path, part: str, name: str) -> Iterator[None]:
    """Turns an error of TensorStore into one that names the array."""
    try:
        yield
    except (ValueError, OSError, LookupError, RuntimeError) as error:
        line = str(error).partition("\n")[0]
        if "PERMISSION_DENIED" in line:
            raise PermissionError(f"{folder / part} cannot be read: {line}") from error
        raise Damaged(folder, f"{part} array {name} cannot be read: {line}") from error
