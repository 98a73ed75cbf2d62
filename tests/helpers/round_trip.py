"""Reads a model and writes it again, and compares what comes back bit for bit."""

import jax

from fastvlm_jax import convert, model_io
from fastvlm_jax.convert.mapping import read_tree


def write(source, target, layout, **options):
    """Writes the model of a source in a layout; returns the target."""
    loaded = model_io.read(source)
    convert.write(target, layout, loaded.variables, loaded.config, loaded.processor, loaded.lineage, **options)
    return target


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_variables(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(read_tree(a, None)), jax.tree.leaves(read_tree(b, None)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
