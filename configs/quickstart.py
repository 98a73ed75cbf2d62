"""The whole recipe in minutes on two CPU cores: easy-VQA and a tiny FastVLM.

    fastvlm train --config configs/quickstart.py:stage1_align --workdir runs/quickstart/stage1_align

A tiny model has no pretrained weights to align, so the stages mean what they can mean here:
  stage1_align      64 px, 1 token an image. Everything learns from scratch, BatchNorm statistics included, in training
                    form. (The paper's stage 1 trains the projector between a pretrained encoder and decoder.)
  stage15_pretrain  128 px, 4 tokens: the full model goes on at the target resolution.
  stage2_instruct   128 px. The encoder is folded and frozen; projector and decoder learn to answer.
"""

from fastvlm_jax.config import get_base


def get_config(stage: str = "stage1_align"):
    c = get_base("tiny")
    c.stage = stage
    c.data.path = "data/easy_vqa"
    c.data.template, c.data.turns, c.data.cache_images = "chatml", "separate", True
    c.data.groups, c.data.images_per_group = 2, 8
    c.checkpoint_every = c.eval_every = 500
    c.eval_batches, c.eval_questions = 12, 300
    if stage == "stage1_align":
        c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
        c.data.image_size, c.data.rows_per_group, c.data.row_length = 64, 25, 64
        c.epochs, c.groups = 7.0, ((".*", 2e-3, 0.05),)
    elif stage == "stage15_pretrain":
        c.parent = "runs/quickstart/stage1_align"
        c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
        c.data.image_size, c.data.rows_per_group, c.data.row_length = 128, 14, 128
        c.epochs, c.groups = 2.0, (("vision/.*", 5e-4, 0.05), (".*", 1e-3, 0.0))
    elif stage == "stage2_instruct":
        c.parent = "runs/quickstart/stage15_pretrain"
        c.data.image_size, c.data.rows_per_group, c.data.row_length = 128, 14, 128
        c.epochs, c.groups = 2.0, (("vision/.*", 0.0, 0.0), ("projector/.*", 5e-4, 0.0), (".*", 5e-4, 0.0))
    else:
        raise ValueError(f"unknown stage {stage!r}: choose stage1_align, stage15_pretrain or stage2_instruct")
    return c
