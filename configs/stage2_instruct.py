"""Stage 2 tunes the whole model on visual instructions (paper, Tables 8 and 9): one epoch, 0.7M to 12.5M conversations.

    fastvlm train --config configs/stage2_instruct.py:0.5b --workdir DIR --config.parent=STAGE15
    fastvlm train --config configs/stage2_instruct.py:parent=STAGE15 ...  the size is the parent's
    fastvlm train --config configs/stage2_instruct.py:0.5b/665k ...       665k, 1.1m (the default), 6.5m, 11.9m or 12.5m
    fastvlm train --config configs/stage2_instruct.py:/665k,parent=STAGE15 ...

docs/data.md explains how to write the data sets, in data/; --config.data.path=DIR takes another. For the paper's
dynamic resolution (AnyRes), 2 x 2 tiles of 1024 px and an overview of each image, add
--config.data.grids="((2, 2),)" --config.data.images_per_group=5 --config.data.groups=128
"""

from fastvlm_jax.config import fit_rows
from fastvlm_jax.parent import open_base

# Name of a mixture -> folder that it adds to the mixture before; the 1.1M hold LLaVA-1.5's 665K (paper, appendix D).
ADDED = {
    "1.1m": "internvl_1.1m",
    "6.5m": "cambrian_5.4m",
    "11.9m": "onevision_single_image",
    "12.5m": "docmatix_0.6m",
}


def get_config(size: str = "0.5b/1.1m"):
    size, given, parent = size.partition("parent=")
    size, _, data = size.removesuffix(",").partition("/")
    data = data or "1.1m"
    if data not in ("665k", *ADDED):
        raise ValueError(f"unknown data {data!r}: choose 665k, {', '.join(ADDED)} (as in FILE.py:0.5b/665k)")
    c = open_base(size + given + parent)
    c.stage = "stage2_instruct"
    folders = ["llava_665k"] if data == "665k" else list(ADDED.values())[: list(ADDED).index(data) + 1]
    c.data.mixture = tuple((folder, 0.0) for folder in folders)
    fit_rows(c, samples=128, images=4, text=256)  # batch size 128
    c.groups = (("vision/.*", 2e-5, 0.0), ("projector/.*", 2e-5, 0.0), ("llm/.*", 2e-5, 0.0))
    return c
