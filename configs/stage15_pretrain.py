"""Stage 1.5: scale the resolution (paper, Table 9). 15M dense captions, one epoch, the full model.

fastvlm train --config configs/stage15_pretrain.py:0.5b --workdir DIR --config.parent=STAGE1

The data sets, data/recap_cc3m and data/recap_cc12m, are written as docs/data.md tells. In several resolutions at once:
--config.data.resolutions="((512, 0.3), (1024, 0.7))"
"""

from fastvlm_jax.config import fit_rows, get_base


def get_config(size: str = "0.5b"):
    c = get_base(size)
    c.stage = "stage15_pretrain"
    c.data.mixture = (("recap_cc3m", 0.0), ("recap_cc12m", 0.0))
    fit_rows(c, samples=128, images=4, text=224)  # batch size 128
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
