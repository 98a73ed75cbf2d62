"""Finds by arithmetic the mesh, accumulation and remat with which a run fits a TPU slice; its results stay the same."""

import math

import jax

from fastvlm_jax import sharding
from fastvlm_jax.preflight import search
from fastvlm_jax.preflight.search import Candidate
from fastvlm_jax.preflight.topology import Slice

GROUPING = ("data.groups", "data.images_per_group", "data.row_length")  # of these the results depend


def fits(candidate: Candidate, slices: Slice) -> bool:
    """Returns whether a candidate fits a device by arithmetic."""
    return candidate.bytes <= 0.95 * slices.generation.hbm_limit


def candidates(config, slices: Slice) -> list[Candidate]:
    """Returns the settings that fit, fastest first, with the batches as they are; if none fits, smallest memory first.

    None at all for batches of several rows, or if no mesh of the slice divides them.
    """
    try:
        ranked = search.rank(config, slices)
    except ValueError:
        return []
    own = search.given(config, _mesh(config, slices))
    return [found for found in ranked if all(found.settings[key] == own[key] for key in GROUPING)]


def as_given(config, slices: Slice, ranked: list[Candidate]) -> Candidate | None:
    """Returns the candidate with the config's own settings; None if others fit and it does not."""
    own = search.given(config, _mesh(config, slices))
    return next((found for found in ranked if not search.differing(found.settings, own)), None)


def _mesh(config, slices: Slice) -> jax.sharding.AbstractMesh:
    """Returns a config's mesh on a slice without devices; sizes that do not divide it stay as they are."""
    sizes = list(config.mesh)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, slices.num_devices // -math.prod(sizes))
    axes = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.AbstractMesh(tuple(sizes), sharding.MESH_AXES, axis_types=axes)
