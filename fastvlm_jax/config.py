"""Every key of a training config, once, with its default; and the model sizes. Stage files override."""

from typing import Any

import ml_collections

# The decoders of the paper (section 4) and the tiny one of the quickstart: arguments of models.decoder.Decoder.
LLM_SIZES = {
    "tiny": dict(
        width=96, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=256, vocab_size=512, rope_theta=1e4, init_std=0.1
    ),
    "0.5b": dict(width=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_dim=4864, vocab_size=151_936),
    "1.5b": dict(width=1536, num_layers=28, num_heads=12, num_kv_heads=2, mlp_dim=8960, vocab_size=151_936),
    "7b": dict(
        width=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_dim=18944, vocab_size=152_064, tie_embeddings=False
    ),
}
# FastViTHD (paper, section 3.2) and a tower of the same kind for the quickstart: arguments of models.fastvit.FastViT.
VISION_SIZES = {
    "tiny": dict(layers=(1, 1, 1, 1, 1), embed_dims=(16, 32, 64, 64, 128), layer_scale_init=0.1, init_std=0.1),
    "fastvithd": dict(layers=(2, 12, 24, 4, 2), embed_dims=(96, 192, 384, 768, 1536)),
}


def get_base(size: str) -> ml_collections.ConfigDict:
    """The config of a model size ("tiny", "0.5b", "1.5b", "7b"), to be overridden by a stage file.

    Raises:
      ValueError: unknown size.
    """
    if size not in LLM_SIZES:
        raise ValueError(f"unknown model size {size!r}: choose one of {', '.join(LLM_SIZES)} (as in FILE.py:0.5b)")
    tiny = size == "tiny"
    c = ml_collections.ConfigDict()
    c.stage = ""  # name of the stage, kept in the lineage
    c.seed = 0  # of the initial weights, the data order and the step's randomness
    c.parent = ""  # where the weights come from: a workdir, a checkpoint or a model directory; "" = from scratch

    c.model = ml_collections.ConfigDict()
    c.model.dtype = "float32" if tiny else "bfloat16"  # of the computation; parameters are float32
    c.model.vision = ml_collections.ConfigDict(VISION_SIZES["tiny" if tiny else "fastvithd"])
    # The paper does not say in which form, or with which BatchNorm statistics, the tower is tuned in a VLM. The
    # public code builds the folded one; frozen statistics make the loss independent of mesh and batch.
    c.model.vision.form = "folded"  # "branched" = training form, "folded" = released form
    c.model.vision.batch_norm = "frozen"  # "train" = batch statistics, updated; "frozen" = stored ones
    c.model.vision.drop_path = 0.0  # rate at the last block
    c.model.vision.remat = not tiny  # recompute blocks in the backward pass
    c.model.llm = ml_collections.ConfigDict(LLM_SIZES[size])
    c.model.llm.remat = not tiny

    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # folder of ArrayRecord shards (`fastvlm data`)
    c.data.tokenizer = ""  # tokenizer.model, tokenizer.json or their folder; "" = the parent's, else the data folder's
    c.data.template = "qwen_2"  # conversation template: qwen_2, chatml or plain
    c.data.image_size = 1024  # side of the square that images are padded and resized to, pixels
    c.data.turns = "conversation"  # "separate" = every question of a conversation is its own segment
    c.data.groups = 128  # G: groups in a global batch; the data shards of the mesh divide it
    c.data.images_per_group = 1  # N: image slots of a group
    c.data.rows_per_group = 1  # R: text rows of a group
    c.data.row_length = 2048  # T: tokens of a row
    c.data.cache_images = False  # keep decoded images in memory (small sets)
    c.data.num_threads = 2  # that build batches
    c.data.prefetch = 4  # batches built ahead

    # (path regex, peak learning rate, weight decay): first match wins, rate 0 = frozen. Every parameter must match.
    c.groups = ((".*", 2e-5, 0.0),)
    c.epochs = 1.0  # passes over the training split
    c.steps = 0  # optimizer steps; 0 = by epochs
    c.warmup_ratio = 0.03  # share of the steps with a linearly rising rate, then cosine to zero
    c.beta1, c.beta2, c.epsilon = 0.9, 0.999, 1e-8  # AdamW
    c.clip_norm = 1.0  # global norm over all trainable gradients
    c.mesh = (1, -1, 1, 1)  # devices over (replica, data, fsdp, tensor); -1 = the rest

    c.log_every = 10  # steps between metrics
    c.checkpoint_every = 1000  # steps between checkpoints; one is always written at the end
    c.keep_checkpoints = 2  # latest ones kept
    c.eval_every = 1000  # steps between validations; one is always made at the end
    c.eval_batches = 16  # batches of the validation loss; 0 = no validation
    c.eval_questions = 0  # validation questions answered by greedy decoding; 0 = none
    return c


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses settings that contradict each other (ValueError naming the key)."""
    if not config.data.path:
        raise ValueError("data.path is empty: name the folder of shards with --config.data.path=DIR")
    for key in ("log_every", "checkpoint_every", "eval_every", "keep_checkpoints"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be at least 1")


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON-ready dicts and lists."""

    def convert(value):
        if isinstance(value, ml_collections.ConfigDict | dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    return convert(config)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The keys in which two plain configs differ, dotted, with both values (None where a key is missing)."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append((prefix + key, x, y))
    return found
