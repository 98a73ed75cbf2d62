"""Stage 1.5 trains the whole model at full resolution (paper, Table 9): one epoch of 15M dense captions.

    fastvlm train --config configs/stage15_pretrain.py:0.5b --workdir DIR --config.parent=STAGE1
    fastvlm train --config configs/stage15_pretrain.py:parent=STAGE1 --workdir DIR      the size is the parent's

docs/data.md explains how to write the data sets, data/recap_cc3m and data/recap_cc12m. To train in several resolutions
at once, add --config.data.resolutions="((512, 0.3), (1024, 0.7))".
"""

from fastvlm_jax.config import fit_rows
from fastvlm_jax.parent import open_base


def get_config(size: str = "0.5b"):
    c = open_base(size)
    c.stage = "stage15_pretrain"
    c.data.mixture = (("recap_cc3m", 0.0), ("recap_cc12m", 0.0))
    fit_rows(c, samples=128, images=4, text=224)  # batch size 128
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
