"""Stage 0 pretrains the encoder beside a text tower on pairs of an image and its caption, as MobileCLIP does.

    fastvlm train --config configs/stage0_clip.py:s3 --workdir DIR --config.data.tokenizer=bpe_simple_vocab_16e6.txt.gz
    fastvlm train --config configs/stage1_align.py:0.5b --workdir DIR2 --config.parent=vision=DIR,llm=DIR3

The argument is SIZE or SIZE/DATA. SIZE: s0 to s4 of MobileCLIP2, whose s3 holds FastViTHD; tiny for a CPU; or an
encoder and a text tower, as in convnext_l,768. DATA: 1b (the default) and 12m distil DataCompDR's teachers; pairs
learns from any pairs, data/pairs. To begin at a lower resolution, run the stage with --config.data.image_size=128 and
fewer steps, then again at 256 with the first run as --config.parent. docs/contrastive.md explains it all.
"""

from fastvlm_jax.config import pairs_of


def get_config(argument: str = "s3"):
    size, _, data = argument.partition("/")
    data = data or ("pairs" if size == "tiny" else "1b")
    c = pairs_of(size)
    c.stage = "stage0_clip"
    # ml-mobileclip, run_datacompdr12m.sh: 30,000 steps of 8,192; run_datacompdr1b.sh: 200,000 of 65,536.
    batch, c.steps = {"1b": (65_536, 200_000), "12m": (8_192, 30_000), "pairs": (8_192, 30_000)}.get(data, (0, 0))
    if not batch:
        raise ValueError(f"unknown data {data!r}: choose 1b, 12m or pairs (as in FILE.py:s3/12m)")
    # BatchNorm took 256 images together in MobileCLIP's paper (256 GPUs) and in the 12M runs (32 GPUs).
    c.data.groups, c.data.images_per_group = batch // 256, 256
    if data == "pairs":
        c.data.mixture = (("pairs", 0.0),)
        c.data.crop_area, c.data.operations = (0.9, 1.0), (0, 0)  # open_clip's, without reinforced data
    else:
        c.data.mixture, c.data.texts, c.data.augment = ((f"datacompdr_{data}", 0.0),), 2, "replay"
        # MobileCLIP (arXiv 2311.17049), Table 8: distillation alone for S0 to S4; both CLIP teachers at 100.
        c.loss.hard, c.loss.soft, c.loss.teachers = 0.0, 1.0, ((768, 100.0), (768, 100.0))
    # MobileCLIP2 (arXiv 2508.20691), Table of hyper-parameters: AdamW, rate 1e-3, beta2 0.95, decay 0.2, clipping at 1.
    c.groups, c.beta2, c.warmup = ((".*", 1e-3, 0.2),), 0.95, "open_clip"
    # Its s0 and s2 warm up for 10,000 of 200,000 steps and end at 1e-6, its s3 and s4 for 2,000 and end at 0.
    c.warmup_ratio, c.final_rate = (0.05, 1e-3) if size in ("s0", "s1", "s2") else (0.01, 0.0)
    # open_clip of March 2025, which ml-mobileclip patches: all but biases, norms and the factor of the logits. Layer
    # scales decay; later versions leave out the positions.
    c.decayed = ("kernel", "embedding", "positions", "projection")
    c.decayed += ("layer_scale_mixer", "layer_scale_ffn", "layer_scale")
    c.ema = 0.9995  # MobileCLIP's paper; the published scripts keep none
    c.eval_batches = 0
    if size == "tiny":  # easy-VQA's captions on a CPU: see docs/contrastive.md
        c.data.groups, c.data.images_per_group, c.data.image_size = 4, 16, 128
        c.model.vision.batch_norm_images, c.data.cache_images = -1, True
        c.steps, c.epochs, c.ema, c.eval_batches, c.eval_every = 0, 4.0, 0.0, 3, 500
        c.log_every = 25
    return c
