"""Holds the latencies that the FastVLM paper (arXiv 2412.13303v2) published, as data to print beside measured ones.

The paper's machine is a MacBook Pro with an M1 Max: the encoder runs by Core ML on its Neural Engine, the language
model by MLX on its GPU, in float16 and with batch 1. Its time to first token is the encoder's latency plus the prefill
of the image tokens alone: text tokens, projector, decoding and resizing of the image are not counted. Keys are those of
models.sizes; encoders that are not there are named in words.
"""

MACHINE = "M1 Max, Core ML and MLX, float16"

# Table 10: latency of the encoder by (encoder, side of the square image in pixels), ms.
VISION_MS = {
    ("fastvithd", 256): 6.8,
    ("fastvithd", 768): 54.8,
    ("fastvithd", 1024): 116.3,
    ("clip_vit_l_336", 336): 127.4,
    ("siglip_so400m_384", 384): 272.1,
    ("ViTamin-L", 384): 137.6,
    ("convnext_l", 768): 164.3,
    ("convnext_l", 1024): 696.1,
    ("convnext_l", 1536): 1569.7,
    ("convnext_xxl", 1024): 2290.4,
    ("DINOv2-L", 518): 1171.5,
    ("ViT-g", 224): 149.5,
}
# Table 10: 2048 px are a whole image and 2 x 2 tiles of 1024 px, so five times the latency of one.
TILES_MS = {("fastvithd", 1024, (2, 2)): 581.5}

# Table 10: prefill by (language model, image tokens), ms. 0.5b, 1.5b and 7b are Qwen2.
PREFILL_MS = {
    ("0.5b", 256): 50.5,
    ("0.5b", 1280): 336.4,
    ("0.5b", 7290): 11402.0,
    ("1.5b", 144): 97.1,
    ("1.5b", 256): 116.1,
    ("1.5b", 1280): 681.7,
    ("7b", 144): 391.2,
    ("7b", 256): 524.5,
    ("7b", 1280): 3139.5,
    ("vicuna-7b", 16): 143.4,
    ("vicuna-7b", 32): 152.1,
    ("vicuna-7b", 144): 332.1,
    ("vicuna-7b", 256): 461.1,
    ("vicuna-7b", 576): 1170.0,
    ("Llama-3-8B", 576): 1223.6,
    ("Llama-3-8B", 2880): 19709.7,
}

# Figure 1a (Qwen2-0.5B, LLaVA-1.5's data): (encoder, side in pixels, time to first token in ms, Avg-5 in percent). The
# paper prints no numbers: these are digitised from its picture, to about 2 ms and 0.1 points.
FIGURE_1A_LLM = "0.5b"
FIGURE_1A = (
    ("fastvithd", 256, 32.0, 48.4),
    ("fastvithd", 512, 50.0, 52.5),
    ("fastvithd", 768, 96.0, 54.5),
    ("fastvithd", 1024, 167.0, 55.9),
    ("convnext_l", 320, 64.0, 49.0),
    ("convnext_l", 512, 120.0, 52.2),
    ("convnext_l", 768, 292.0, 54.4),
    ("convnext_l", 1024, 943.0, 55.3),
    ("convnext_xxl", 256, 119.0, 51.9),
    ("clip_vit_l_336", 336, 256.0, 47.3),
    ("siglip_so400m_384", 384, 536.0, 55.5),
)
