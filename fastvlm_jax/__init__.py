"""FastVLM training in JAX/Flax for Cloud TPU. `model, variables, processor = fastvlm_jax.load(path)` loads a model."""


def load(path, dtype=None):
    """Loads (model, variables, processor) from a workdir, a checkpoint or a model directory; see model_io.load."""
    from fastvlm_jax.model_io import load

    return load(path, dtype)
