"""Compiles gradients for TPU slices: images are split over all devices, weights are whole on each."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastvlm_jax import sharding
from fastvlm_jax.preflight import topology
from fastvlm_jax.preflight.compile import compile_with_text

# A slice of each generation; in the default suite v5e alone.
OTHERS = ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1")
SLICES = ["v5e:2x2", *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)]


def gradient_program(name, function, x, weights):
    """Returns the compiled text of (function(x, weights), its gradients), for arrays of these shapes and dtypes."""
    devices = topology.devices(topology.parse(name))  # before `compiler`, which hides the flags of the tests' CPUs
    mesh = sharding.make_mesh((1, -1, 1, 1), devices)
    split, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("replica", "data", "fsdp"), None))

    def placed(tree, layout):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout), tree)

    def gradient(x, weights, dy):
        y, vjp = jax.vjp(function, x, weights)
        return y, vjp(dy)

    with topology.compiler(), jax.set_mesh(mesh):
        dy = jax.eval_shape(function, x, weights)
        lowered = jax.jit(gradient).lower(placed(x, split), placed(weights, whole), placed(dy, split))
        return compile_with_text(lowered)[1]
