"""Stage 3 trains the whole model to reason (paper, section 4): one epoch, MAmmoTH-VL's 10.6M one-image conversations.

    fastvlm train --config configs/stage3_reason.py:0.5b --workdir DIR --config.parent=STAGE2
    fastvlm train --config configs/stage3_reason.py:parent=STAGE2 --workdir DIR      the size is the parent's

docs/data.md explains how to write the data set, data/mammoth_vl_10.6m; --config.data.path=DIR takes another.
"""

from fastvlm_jax.config import fit_rows
from fastvlm_jax.parent import open_base


def get_config(size: str = "0.5b"):
    c = open_base(size)
    c.stage = "stage3_reason"
    c.data.mixture = (("mammoth_vl_10.6m", 0.0),)
    fit_rows(c, samples=128, images=4, text=768)  # batch size 128
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
