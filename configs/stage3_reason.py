"""Stage 3: reasoning (paper, section 4). 10.6M single-image conversations of MAmmoTH-VL, one epoch, the full model.

fastvlm train --config configs/stage3_reason.py:0.5b --workdir DIR --config.parent=STAGE2 --config.data.path=SHARDS
"""

from fastvlm_jax.config import get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage3_reason"
    c.data.groups, c.data.row_length = 128, 4096
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
