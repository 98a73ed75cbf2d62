"""Every key of a training config, once, with its default; and the model sizes. Stage files override."""

import math
from typing import Any

import ml_collections

from fastvlm_jax.models.sizes import LLM_SIZES, QWEN2, VISION_SIZES


def get_base(size: str) -> ml_collections.ConfigDict:
    """The config of a model size, to be overridden by a stage file.

    Args:
      size: a language model of LLM_SIZES, alone or with an encoder of VISION_SIZES, as "vicuna-7b,clip_vit_l_336". The
        default encoder is FastViTHD.

    Raises:
      ValueError: unknown size.
    """
    llm, _, vision = size.partition(",")
    vision = vision or ("tiny" if llm == "tiny" else "fastvithd")
    if llm not in LLM_SIZES:
        raise ValueError(f"unknown model size {llm!r}: choose one of {', '.join(LLM_SIZES)} (as in FILE.py:0.5b)")
    if vision not in VISION_SIZES:
        raise ValueError(
            f"unknown encoder {vision!r}: choose one of {', '.join(VISION_SIZES)} (as in FILE.py:0.5b,mci2)"
        )
    tiny = llm == "tiny"
    c = ml_collections.ConfigDict()
    c.stage = ""  # name of the stage, kept in the lineage
    c.seed = 0  # of the initial weights, the data order and the step's randomness
    # Where the weights come from: a workdir, a checkpoint, a model directory of any layout, or parts of several
    # ("vision=DIR,llm=DIR"); what no part gives, and with "" all, is initialized.
    c.parent = ""

    c.model = ml_collections.ConfigDict()
    c.model.dtype = "float32" if tiny else "bfloat16"  # of the computation
    c.model.vision = ml_collections.ConfigDict(VISION_SIZES[vision])
    if "family" not in VISION_SIZES[vision]:
        # The paper does not say in which form, or with which BatchNorm statistics, the tower is tuned in a VLM. The
        # public code builds the folded one; frozen statistics make the loss independent of mesh and batch.
        c.model.vision.form = "folded"  # "branched" = training form, "folded" = released form
        c.model.vision.batch_norm = "frozen"  # "train" = batch statistics, updated; "frozen" = stored ones
        c.model.vision.drop_path = 0.0  # rate at the last block
        c.model.vision.multiscale = ()  # earlier stages whose pooled outputs join the features (paper, Figure 2)
        c.model.vision.multiscale_pool = "average"  # or "depthwise", learned
    # What images in [0, 1] are normalised with, a colour: FastVLM's own encoder takes them as they are.
    c.model.vision.image_mean = VISION_SIZES[vision].get("image_mean", (0.0, 0.0, 0.0))
    c.model.vision.image_std = VISION_SIZES[vision].get("image_std", (1.0, 1.0, 1.0))
    # What the backward pass recomputes, see models/remat.py.
    c.model.vision.remat = "none" if tiny else "full" if "family" in VISION_SIZES[vision] else "depthwise"
    c.model.llm = ml_collections.ConfigDict({**QWEN2, **LLM_SIZES[llm]})
    c.model.llm.remat = "none" if tiny else "full"

    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # folder of ArrayRecord shards (`fastvlm data write`), local or gs://; takes the mixture's place
    c.data.root = "data"  # folder or gs:// prefix that the mixture's folders lie in
    # ((folder, share of the records drawn), ...); all shares 0 = each record of each set once an epoch.
    c.data.mixture = ()
    c.data.tokenizer = ""  # tokenizer.model, tokenizer.json or their folder; "" = the parent's, else the data folder's
    # Conversation template: qwen_2, vicuna_v1, chatml or plain.
    c.data.template = {"vicuna-7b": "vicuna_v1", "smollm2-135m": "chatml"}.get(llm, "qwen_2")
    # Side of the square that images are padded and resized to, pixels; vision transformers take one size only.
    c.data.image_size = VISION_SIZES[vision].get("image_size", 1024)
    # Sides that batches come in, as ((512, 0.3), (1024, 0.7)) with their shares of the records; () = image_size alone.
    c.data.resolutions = ()
    # Shapes of images, (width, height) as ((1, 1), (4, 3), (3, 4)): each goes to the nearest; () = squares.
    c.data.aspects = ()
    c.data.fit = "pad"  # "pad" = the whole image on a background, "crop" = fill the size, cut off what is over
    # AnyRes: (rows, columns) of tiles of image_size as ((2, 2),), each beside an overview; () = one view an image.
    c.data.grids = ()
    c.data.decode = "fast"  # libjpeg's scaled decoding and OpenCV; "exact" = the pixels of CLIPImageProcessor
    c.data.turns = "conversation"  # "separate" = every question of a conversation is its own segment
    c.data.overlong = "truncate"  # texts longer than a row lose their oldest questions; "reject" = the record
    c.data.max_substituted = 0.01  # share of records that may be unusable, and so replaced, before training stops
    c.data.groups = 128  # G: groups in a global batch; the data shards of the mesh divide it
    c.data.images_per_group = 1  # N: image slots of a group, of image_size; of smaller sizes more, of tiles each one
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
    # Devices over (replica, data, fsdp, tensor); -1 = the rest. replica: whole copies, one or more a slice, with one
    # reduction of gradients between slices; data: copies within a slice; fsdp: parameters and optimizer split, gathered
    # layer by layer; tensor: heads and MLP split, at most num_kv_heads.
    c.mesh = (1, -1, 1, 1) if tiny else (1, 1, -1, 1)
    c.shard_frozen = True  # False = frozen parameters lie whole on every device of fsdp: no gathers, more memory
    c.accumulate = 1  # parts that the groups of a batch are taken in, one after another: less memory, the same step
    c.param_dtype = "float32"  # or "bfloat16", which loses updates smaller than 1/256 of a weight
    c.moment_dtype = "float32"  # of Adam's first moment; "bfloat16" saves 2 bytes a parameter

    c.wandb = ""  # Weights & Biases: project that the metrics are sent to as well; "" = none
    c.log_every = 10  # steps between metrics
    c.checkpoint_every = 1000  # steps between checkpoints; one is always written at the end
    c.keep_checkpoints = 2  # latest ones kept
    c.eval_every = 1000  # steps between validations; one is always made at the end
    c.eval_batches = 16  # batches of the validation loss; 0 = no validation
    c.eval_questions = 0  # validation questions answered by greedy decoding; 0 = none
    return c


def fit_rows(config: ml_collections.ConfigDict, samples: int, images: int, text: int) -> None:
    """Sets data.groups, images_per_group and row_length for packed batches of about `samples` samples.

    Args:
      images: a group's image slots, one a sample.
      text: tokens of text that a sample has on average; longer ones and shorter ones share a row.
    """
    from fastvlm_jax.models.fastvlm import make_encoder

    rows, columns = make_encoder(**config.model.vision.to_dict()).grid(config.data.image_size, config.data.image_size)
    config.data.groups, config.data.images_per_group = samples // images, images
    config.data.row_length = -(-images * (rows * columns + text) // 256) * 256


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses settings that contradict each other (ValueError naming the key)."""
    for key in ("log_every", "checkpoint_every", "eval_every", "keep_checkpoints"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be at least 1")
    for key in ("param_dtype", "moment_dtype"):
        if config[key] not in ("float32", "bfloat16"):
            raise ValueError(f"{key}={config[key]!r} must be float32 or bfloat16")
    if config.accumulate < 1 or config.data.groups % config.accumulate:
        raise ValueError(f"accumulate={config.accumulate} must divide data.groups={config.data.groups}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be from 0 to {2**32 - 1}")
    data = config.data
    for key in ("image_size", "groups", "rows_per_group", "row_length"):
        if data[key] < 1:
            raise ValueError(f"data.{key}={data[key]} must be at least 1")
    for key in ("images_per_group", "num_threads", "prefetch", "max_substituted"):
        if not data[key] >= 0:
            raise ValueError(f"data.{key}={data[key]} must be at least 0")
    sides = _pairs(data, "resolutions", "sides and positive shares, as ((512, 0.3), (1024, 0.7))", whole=1)
    if len({side for side, _ in sides}) < len(sides):
        raise ValueError(f"data.resolutions={data.resolutions} names a side twice")
    _pairs(data, "aspects", "positive widths and heights, as ((1, 1), (4, 3))", whole=0)
    _pairs(data, "grids", "rows and columns of tiles, as ((2, 2),)", whole=2)


def _pairs(data: ml_collections.ConfigDict, key: str, what: str, whole: int) -> list[tuple]:
    """The pairs of a setting, whose first `whole` are whole numbers; ValueError where they are not, or not positive."""
    try:
        pairs = [(first, second) for first, second in data[key]]
        fine = all(isinstance(x, int) for pair in pairs for x in pair[:whole])
        fine &= all(0 < x < math.inf for pair in pairs for x in pair)
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"data.{key}={data[key]} must be pairs of {what}")
    return pairs


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
