"""Random variables of any FastVLM or CLIP, of unit gain."""

import flax
import numpy as np

from fastvlm_jax.convert.mapping import shapes_of
from fastvlm_jax.models import kinds


def random_variables(config):
    """Returns (model, variables) with every leaf random; variances and scales lie in [0.5, 2]."""
    model, rng = kinds.build(**config), np.random.default_rng(0)
    shapes = shapes_of(model)

    def leaf(path, shape):
        if path.endswith(("scale", "var")) or "layer_scale" in path:
            return rng.uniform(0.5, 2, shape).astype(np.float32)
        gain = 0.2 if len(shape) == 1 else 0.7 * np.prod(shape[-4:-1]) ** -0.5
        return (gain * rng.standard_normal(shape)).astype(np.float32)

    flat = {path: leaf(path, shape) for path, shape in shapes.items()}
    return model, flax.traverse_util.unflatten_dict(flat, sep="/")
