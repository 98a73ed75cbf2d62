"""Trains on a few hundred images of your own, on a CPU or one card: a tiny FastVLM from scratch, or a published one.

    fastvlm train --config configs/own_data.py --workdir runs/mine --config.data.path=data/mine
    fastvlm train --config configs/own_data.py:parent=MODEL --workdir runs/mine ...

README.md (Your own images) has the commands before and after. The tiny model learns in minutes to answer short
questions that repeat: it shows that data and commands are right before a published model is fine-tuned. Batches of 16
samples give a small data set enough steps (the paper's have 128 and more). The rates are not tuned.
"""

from fastvlm_jax.config import fit_rows
from fastvlm_jax.parent import open_base


def get_config(size: str = "tiny"):
    c = open_base(size)
    c.stage = "own_data"
    c.data.path = "data/mine"
    if size == "tiny":
        c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
        c.data.template, c.data.turns, c.data.cache_images = "chatml", "separate", True
        c.data.image_size, c.data.groups, c.data.images_per_group, c.data.row_length = 192, 2, 8, 512
        c.epochs, c.groups = 20.0, (("vision/.*", 2e-3, 0.05), (".*", 1e-3, 0.0))
    else:
        fit_rows(c, samples=16, images=2, text=256)
        c.epochs, c.groups = 3.0, ((".*", 1e-5, 0.0),)
    c.log_every, c.checkpoint_every, c.eval_every = 10, 200, 200
    c.evaluate = (("qa", "", 50),)
    return c
