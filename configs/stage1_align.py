"""Stage 1: align the projector (paper, Table 8). LLaVA-1.5's 558K captions, one epoch, encoder and decoder frozen.

fastvlm train --config configs/stage1_align.py:0.5b --workdir DIR --config.parent=MODEL --config.data.path=SHARDS
"""

from fastvlm_jax.config import get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage1_align"
    c.data.template, c.data.groups, c.data.row_length = "plain", 256, 1024
    if "image_size" not in c.model.vision:  # a vision transformer has but one size
        # The paper aligns at the encoder's CLIP resolution: 224 for FastViTHD, which gives 16 tokens as 256 does.
        c.data.image_size, c.data.row_length = 256, 512
    c.groups = (("projector/.*", 1e-3, 0.0), (".*", 0.0, 0.0))
    return c
