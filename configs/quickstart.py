"""Trains a tiny FastVLM on easy-VQA: the whole recipe, in minutes on two CPU cores.

    fastvlm train --config configs/quickstart.py:stage1_align --workdir runs/quickstart/stage1_align

launch/quickstart.sh writes the data and runs all stages. A tiny model has no pretrained weights to align, so its stages
differ from those of the paper:

  stage1_align      Captions ("a blue triangle") at 128 px, 4 tokens an image. The whole model is trained from scratch,
                    in training form, BatchNorm statistics included. (The paper's stage 1 trains only the projector,
                    between a pretrained encoder and decoder.)
  stage15_pretrain  Captions at 192 px, 9 tokens an image: the whole model is trained at the target resolution.
  stage2_instruct   Questions at 192 px. The encoder is folded and frozen; projector and decoder are trained to answer.
"""

from fastvlm_jax.config import get_base


def get_config(stage: str = "stage1_align"):
    c = get_base("tiny")
    c.stage = stage
    c.data.path, c.data.tokenizer, c.data.cache_images = "data/easy_vqa/captions", "data/easy_vqa", True
    c.data.groups, c.data.images_per_group, c.data.rows_per_group = 2, 8, 1
    c.log_every, c.checkpoint_every, c.eval_every = 25, 500, 500
    c.eval_batches, c.evaluate = 12, (("qa", "", 300),)
    if stage == "stage1_align":
        c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
        c.data.template, c.data.image_size, c.data.row_length = "plain", 128, 80
        c.epochs, c.groups = 6.0, (("vision/.*", 2e-3, 0.05), (".*", 1e-3, 0.0))
    elif stage == "stage15_pretrain":
        c.parent = "runs/quickstart/stage1_align"
        c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
        c.data.template, c.data.image_size, c.data.row_length = "plain", 192, 128
        c.epochs, c.groups = 1.0, (("vision/.*", 5e-4, 0.05), (".*", 5e-4, 0.0))
    elif stage == "stage2_instruct":
        c.parent = "runs/quickstart/stage15_pretrain"
        c.data.path, c.data.template, c.data.turns = "data/easy_vqa", "chatml", "separate"
        c.data.image_size, c.data.rows_per_group, c.data.row_length = 192, 16, 160
        c.epochs, c.groups = 4.0, (("vision/.*", 0.0, 0.0), (".*", 2e-3, 0.0))
    else:
        raise ValueError(f"unknown stage {stage!r}: choose stage1_align, stage15_pretrain or stage2_instruct")
    return c
