"""Stage 2: visual instruction tuning (paper, Tables 8 and 9). 0.7M to 12.5M conversations, one epoch, the full model.

fastvlm train --config configs/stage2_instruct.py:0.5b --workdir DIR --config.parent=STAGE15 --config.data.path=SHARDS
"""

from fastvlm_jax.config import get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage2_instruct"
    c.data.groups, c.data.row_length = 128, 2048
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
