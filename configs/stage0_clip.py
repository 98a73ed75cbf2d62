"""Stage 0 pretrains the encoder beside a text tower on pairs of an image and its caption, as MobileCLIP does.

    fastvlm train --config configs/stage0_clip.py:s3 --workdir DIR --config.data.tokenizer=bpe_simple_vocab_16e6.txt.gz
    fastvlm train --config configs/stage1_align.py:0.5b --workdir DIR2 --config.parent=vision=DIR,llm=DIR3

The argument is SIZE or SIZE/DATA. SIZE: s0 to s4 of MobileCLIP2 and MobileCLIP, whose s3 holds FastViTHD; tiny and
mini for a CPU; or an encoder and a text tower, as in convnext_l,768. DATA: 1b (the default) and 12m distil DataCompDR's
teachers; pairs (tiny's default) learns from any pairs, data/pairs; icons (mini's) from what `fastvlm data icons` writes
to data/icons. To begin at a lower resolution, run the stage with --config.data.image_size=128 and fewer steps, then
again at 256 with the first run as --config.parent. docs/contrastive.md explains it all.
"""

from fastvlm_jax.config import pairs_of


def get_config(argument: str = "s3"):
    size, _, data = argument.partition("/")
    data = data or {"tiny": "pairs", "mini": "icons"}.get(size, "1b")
    c = pairs_of(size)
    c.stage = "stage0_clip"
    # Batch, steps and warm-up. 1b: run_datacompdr1b.sh of ml-mobileclip and the papers; 12m: run_datacompdr12m.sh.
    sizes = {"1b": (65_536, 200_000, 2_000), "12m": (8_192, 30_000, 1_000), "pairs": (8_192, 30_000, 1_000)}
    sizes["icons"] = (256, 1_000, 30)  # 40 minutes for mini on two cores
    if data not in sizes:
        raise ValueError(f"unknown data {data!r}: choose 1b, 12m, pairs or icons (as in FILE.py:s3/12m)")
    batch, c.steps, warmup = sizes[data]
    # MobileCLIP2 (arXiv 2508.20691) as reviewed: S0 and S2 warm up for 10,000 of 200,000 steps and end at 1e-6, S3 and
    # S4 for 2,000 and end at 0.
    if data == "1b" and size in ("s0", "s1", "s2"):
        warmup, c.final_rate = 10_000, 1e-3
    # BatchNorm took 256 images together in MobileCLIP's paper (256 GPUs) and in the 12M runs (32 GPUs), 512 in the 1B
    # script, 448 or 896 for S3 and S4.
    c.data.groups, c.data.images_per_group = batch // 256, 256
    if data in ("pairs", "icons"):
        c.data.mixture = ((data, 0.0),)
        c.data.crop_area, c.data.operations = (0.9, 1.0), (0, 0)  # open_clip's, without reinforced data
    else:
        c.data.mixture, c.data.texts, c.data.augment = ((f"datacompdr_{data}", 0.0),), 2, "replay"
        # The published scripts: distillation alone for the S sizes; both CLIP teachers at a factor of 100.
        c.loss.hard, c.loss.soft, c.loss.teachers = 0.0, 1.0, ((768, 100.0), (768, 100.0))
        c.ema = 0.9995  # MobileCLIP's paper (arXiv 2311.17049); the published scripts keep none
    # The published scripts: AdamW, rate 1e-3, beta2 0.95, decay 0.2, gradients clipped at 1.
    rate, decay = (2e-3, 0.1) if data == "icons" else (1e-3, 0.2)  # a narrow tower and a short run bear more
    c.groups, c.beta2, c.warmup, c.warmup_ratio = ((".*", rate, decay),), 0.95, "open_clip", warmup / c.steps
    # open_clip of March 2025, which ml-mobileclip patches: all with two dimensions or more in PyTorch, as a FastViT's
    # layer scales; later versions leave out the positions.
    c.decayed = ("kernel", "embedding", "positions", "projection")
    family = c.model.vision.get("family", "fastvit")
    if family == "fastvit":
        c.decayed += ("layer_scale", "layer_scale_mixer", "layer_scale_ffn")
    if family == "vit":  # its last layer learns too, and only what LLaVA's tower leaves unused is frozen
        c.model.vision.select_layer = -1
        c.groups = (("vision/unused/.*", 0.0, 0.0), *c.groups)
    c.eval_batches = 0
    # On a CPU, where the statistics of a whole batch cost nothing: see docs/contrastive.md.
    if size in ("tiny", "mini"):
        c.data.image_size, c.data.cache_images, c.model.vision.batch_norm_images, c.log_every = 128, True, -1, 25
    if (size, data) == ("tiny", "pairs"):  # easy-VQA's captions
        c.data.groups, c.data.images_per_group = 4, 16
        c.steps, c.epochs, c.warmup_ratio, c.eval_batches, c.eval_every = 0, 4.0, 0.03, 3, 500
    if data == "icons":  # few pictures, seen often: each time another part of them, in other colours
        c.model.text.vocab_size, c.model.text.context_length = 2050, 24  # of the tokenizer beside them
        c.data.groups, c.data.images_per_group = 4, 64
        c.data.crop_area, c.data.operations = (0.6, 1.0), (1, 6)
        c.eval_batches, c.eval_every, c.evaluate = 1, 100, (("retrieval", "", 0),)
    return c
