"""Trains a tiny FastVLM to read numbers: the two stages of the sweep's default, minutes each on two CPU cores.

    fastvlm train --config configs/reading.py:learn,tiny --workdir DIR
    fastvlm train --config configs/reading.py:read,tiny,128 --config.parent=DIR --workdir DIR_128

`fastvlm data documents --output data/documents --parts numbers,large_numbers` writes the pages. Behind the stage stands
the encoder, `tiny` (a small FastViTHD) or `fastvit_tiny`, and in stage `read` the side of the image in pixels.

  learn  One, two or four numbers in large digits at 256 px, from scratch. This finds out that the page matters, and
         where its cells are. It takes hundreds of steps, and many more where several digits fall into one token. A
         lower rate of the language model halves the time until then: before the encoder says anything of use, the
         language model learns to ignore it.
  read   Digits of mixed sizes, at the size of the point.
"""

from fastvlm_jax.config import get_base
from fastvlm_jax.models.fastvlm import make_encoder

TEXT = 24  # tokens of a transcription, four numbers of four digits, with those of the template


def get_config(argument: str = "learn,tiny"):
    stage, encoder, side = (*argument.split(",", 2), "", "")[:3]
    c = get_base(f"tiny,{encoder}")
    c.stage = stage
    c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
    c.data.template, c.data.tokenizer = "plain", "data/documents/numbers"
    stride = make_encoder(**c.model.vision.to_dict()).stride
    if stage == "learn":
        c.data.path, c.data.image_size = "data/documents/large_numbers", 256
        c.steps, c.groups = 600, (("llm/.*", 1e-3, 0.0), (".*", 3e-3, 0.0))
    elif stage == "read" and side.isdigit():
        c.data.path, c.data.image_size = "data/documents/numbers", int(side)
        c.steps, c.groups = 900, ((".*", 3e-3, 0.0),)
    else:
        raise ValueError(f"unknown stage {argument!r}: choose learn,ENCODER or read,ENCODER,IMAGE_SIZE")
    c.data.groups, c.data.images_per_group, c.data.rows_per_group = 2, 8, 8
    c.data.row_length = (c.data.image_size // stride) ** 2 + TEXT
    c.warmup_ratio, c.eval_batches = 0.05, 0
    c.log_every, c.checkpoint_every, c.eval_every = 25, 100, 1000
    return c
