"""Stage 1.5: scale the resolution (paper, Table 9). 15M dense captions, one epoch, the full model.

fastvlm train --config configs/stage15_pretrain.py:0.5b --workdir DIR --config.parent=STAGE1 --config.data.path=SHARDS
"""

from fastvlm_jax.config import get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage15_pretrain"
    c.data.groups, c.data.row_length = 128, 1024
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
