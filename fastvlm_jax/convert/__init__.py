"""Model directories in and out: one mapping table a published layout, read forwards to import, backwards to export."""

import os
from typing import Any

from fastvlm_jax.convert.files import recognise
from fastvlm_jax.convert.hf import export_hf, import_hf
from fastvlm_jax.convert.native import load_native, read_lineage, save_native

__all__ = ["export_hf", "import_hf", "load_native", "load_weights", "read_lineage", "recognise", "save_native"]


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict]:
    """(model_config, variables) of a model directory of any layout; raises what `recognise` and the readers do."""
    return {"native": load_native, "hf": import_hf}[recognise(path)](path)
