"""Stage 1: align the projector (paper, Table 8). LLaVA-1.5's 558K captions, one epoch, encoder and decoder frozen.

fastvlm train --config configs/stage1_align.py:0.5b --workdir DIR --config.parent=vision=DIR,llm=DIR

The data set, data/llava_558k, is written as docs/data.md tells; --config.data.path=DIR takes another.
"""

from fastvlm_jax.config import fit_rows, get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage1_align"
    c.data.mixture, c.data.template = (("llava_558k", 0.0),), "plain"
    if "image_size" not in c.model.vision:  # a vision transformer has but one size
        # The paper aligns at the encoder's CLIP resolution: 224 for FastViTHD, which gives 16 tokens as 256 does.
        c.data.image_size = 256
    fit_rows(c, samples=256, images=8, text=40)  # batch size 256
    c.groups = (("projector/.*", 1e-3, 0.0), (".*", 0.0, 0.0))
    return c
