"""Computes what an answer depends on: the live weights, the processor, and the published files.

The fingerprint of the weights is computed where they lie: each leaf becomes two sums of hashed elements, in integers
that wrap, so that it is the same on any mesh and nothing is gathered.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax import sharding
from fastvlm_jax.evaluate.benchmark import Picture, Row
from fastvlm_jax.files import json_digest, sha256
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor

_LARGE = 2**18  # elements
# Arguments that do not change an answer.
_TRAINING_ONLY = ("remat", "kernels", "drop_path", "batch_norm_images", "init_std", "layer_scale_init")


def of_model(
    model: Model, variables: Any, processor: Processor | PairProcessor, mesh: jax.sharding.Mesh | None = None
) -> str:
    """Returns the fingerprint of a model: its variables, architecture, dtype and processor; hexadecimal.

    Args:
      variables: the model's variables, on one device or laid out on `mesh` in any way.
    """
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        sums = jax.device_get([_sums(leaf) for leaf in jax.tree.leaves(variables)])
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), leaf.shape, pair.tolist()]
        for (path, leaf), pair in zip(jax.tree_util.tree_leaves_with_path(variables), sums, strict=True)
    }
    parts = [
        {key: value for key, value in (args or {}).items() if key not in _TRAINING_ONLY}
        for args in (model.vision_args, model.llm_args, *([model.text_args] if isinstance(model, CLIP) else []))
    ]
    return json_digest([leaves, parts, model.dtype, _of_processor(processor)])


def _sums(leaf: jax.Array) -> jax.Array | np.ndarray:
    """Returns the sums, modulo 2^32, of two hashes of every element's bits and place: uint32 [2].

    Small leaves are hashed on the host, which compiles nothing; the others where they lie.
    """
    if leaf.size >= _LARGE or not leaf.is_fully_replicated:
        return _sums_on_device(leaf)
    whole = np.asarray(leaf).reshape(-1)
    bits = whole.view(f"u{whole.dtype.itemsize}").astype(np.uint32)
    return np.stack(_hashes(bits, np.arange(whole.size, dtype=np.uint32)))


@jax.jit
def _sums_on_device(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    return sharding.constrain(jnp.stack(_hashes(bits, place)), (None,))


def _hashes(bits: Any, place: Any) -> list[Any]:
    """Returns the two sums from the bits and the places of all elements, uint32 arrays of numpy or of jax."""
    first = _mixed(bits ^ _mixed(place + np.uint32(0x9E3779B9)))
    return [x.sum(dtype=np.uint32) for x in (first, _mixed(first ^ place))]


def _mixed(x: Any) -> Any:
    """Returns each uint32 with its bits mixed: the finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _of_processor(processor: Processor) -> dict[str, str]:
    """Returns the digest of each file that the processor is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save(folder)
        return {path.name: sha256(path) for path in sorted(pathlib.Path(folder).iterdir()) if path.is_file()}


def of_rows(rows: Sequence[Row]) -> list[str]:
    """Returns for each row the fingerprint of what the benchmark's files say of it, hexadecimal.

    What a reader made of the annotation files counts by its contents. Images count by the name, size and time of the
    file that holds them, or by their contents if that is not a file.
    """
    states: dict[str, Any] = {}
    found = []
    for row in rows:
        pictures = [[picture.name, _state(picture, states)] for picture in row.pictures]
        content = [row.id, row.question, pictures, row.references, row.fields, row.groups]
        found.append(hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest())
    return found


def _state(picture: Picture, states: dict[str, Any]) -> Any:
    name = os.fspath(picture.file) if picture.file is not None else f"contents of {picture.name}"
    if name not in states:
        if picture.file is None:
            states[name] = hashlib.sha256(picture.read()).hexdigest()
        else:
            found = os.stat(picture.file)
            states[name] = [os.path.basename(name), found.st_size, found.st_mtime_ns]
    return states[name]


def _plain(value: Any) -> Any:
    """Returns what stands for a value that JSON does not know: an image in `fields`, a mapping, or its text."""
    if isinstance(value, Picture):
        return value.name
    return dict(value) if isinstance(value, Mapping) else repr(value)
