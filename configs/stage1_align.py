"""Stage 1 aligns the projector (paper, Table 8): one epoch of LLaVA-1.5's 558K captions, encoder and decoder frozen.

    fastvlm train --config configs/stage1_align.py:0.5b --workdir DIR --config.parent=vision=DIR,llm=DIR
    fastvlm train --config configs/stage1_align.py:parent=vision=DIR,llm=DIR --workdir DIR      sizes of the parents

docs/data.md explains how to write the data set, data/llava_558k; --config.data.path=DIR takes another.
"""

from fastvlm_jax.config import fit_rows
from fastvlm_jax.parent import open_base


def get_config(size: str = "0.5b"):
    c = open_base(size)
    c.stage = "stage1_align"
    c.data.mixture, c.data.template = (("llava_558k", 0.0),), "plain"
    if "image_size" not in c.model.vision:  # a vision transformer takes only one size
        # The paper aligns at the encoder's CLIP resolution: 224 for FastViTHD, which gives 16 tokens, as 256 does.
        c.data.image_size = 256
    fit_rows(c, samples=256, images=8, text=40)  # batch size 256
    c.groups = (("projector/.*", 1e-3, 0.0), (".*", 0.0, 0.0))
    return c
