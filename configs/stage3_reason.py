"""Stage 3: reasoning (paper, section 4). 10.6M single-image conversations of MAmmoTH-VL, one epoch, the full model.

fastvlm train --config configs/stage3_reason.py:0.5b --workdir DIR --config.parent=STAGE2

The data set, data/mammoth_vl_10.6m, is written as docs/data.md tells; --config.data.path=DIR takes another.
"""

from fastvlm_jax.config import fit_rows, get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage3_reason"
    c.data.mixture = (("mammoth_vl_10.6m", 0.0),)
    fit_rows(c, samples=128, images=4, text=768)  # batch size 128
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
