"""Compiles gradients for TPU slices: images are split over all devices, weights are whole on each."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastvlm_jax import sharding
from fastvlm_jax.preflight import topology

# A slice of four devices or more of each generation; in the default suite v5e alone.
SLICES = [
    "v5e:2x2",
    *(pytest.param(n, marks=pytest.mark.full) for n in ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1")),
]


def gradient_program(name, function, x, weights):
    """Returns the compiled program of (function(x, weights), its gradients), for arrays of these shapes and dtypes."""
    with topology.compiler():
        mesh = sharding.make_mesh((1, -1, 1, 1), topology.devices(topology.parse(name)))
        split, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("replica", "data", "fsdp"), None))

        def placed(tree, layout):
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout), tree)

        def gradient(x, weights, dy):
            y, vjp = jax.vjp(function, x, weights)
            return y, vjp(dy)

        with jax.set_mesh(mesh):
            x, weights = placed(x, split), placed(weights, whole)
            dy = placed(jax.eval_shape(function, x, weights), split)
            return jax.jit(gradient).lower(x, weights, dy).compile()
