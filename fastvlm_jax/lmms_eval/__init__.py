"""Lets lmms-eval score a model of this package: `python -m lmms_eval --model fastvlm_jax --model_args pretrained=DIR`.

lmms-eval finds `manifest` through the entry point of pyproject.toml, and is imported in this folder alone.
"""


def manifest():
    """Returns lmms-eval's ModelManifest of the model, which it calls "fastvlm_jax"."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("fastvlm_jax", simple_class_path="fastvlm_jax.lmms_eval.model.FastVLM")
