"""Compares how far two runs of the same steps have moved a tree from where both began."""

from collections import defaultdict

import numpy as np
from flax.traverse_util import flatten_dict


def assert_moved_alike(found, expected, initial, tolerance=2e-5, name=""):
    """Compares trees of arrays, each against what has moved: nothing hides behind values that were there before.

    An error is relative to the largest movement in its layer, with four units in the last place of a leaf's largest
    value: the gradient of a bias is a sum that may cancel nearly, whose roundings are those of what flows through
    the layer, and which processor has added them decides their size.
    """
    found, expected, initial = (flatten_dict(tree or {}, sep="/") for tree in (found, expected, initial))
    assert found.keys() == expected.keys() == initial.keys()
    moved = defaultdict(float)
    for path, value in expected.items():
        layer = path.rpartition("/")[0]
        moved[layer] = max(moved[layer], np.abs(np.asarray(value) - np.asarray(initial[path])).max())
    for path, value in expected.items():
        value = np.asarray(value)
        atol = tolerance * moved[path.rpartition("/")[0]] + 4 * np.spacing(np.abs(value).max())
        np.testing.assert_allclose(np.asarray(found[path]), value, rtol=0, atol=atol, err_msg=f"{name} {path}")
