"""Names every key of a training config once, with its default and its meaning. Stage files override them.

docs/config.md is made from the assignments and comments in this file: `python -m fastvlm_jax.report.config_keys`.
"""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from fastvlm_jax.models.sizes import LLM_SIZES, QWEN2, VISION_SIZES

# Keys of earlier versions -> what takes their place.
REPLACED = {
    "eval_questions": 'evaluate=(("qa", "", N),) asks N questions of the held-out split',
    "eval_max_tokens": "each benchmark of `evaluate` has a limit of its own",
}


def get_base(size: str) -> ml_collections.ConfigDict:
    """Returns the config of a model size, which a stage file overrides; see `sizes_of` for sizes and errors."""
    template = {"vicuna-7b": "vicuna_v1", "smollm2-135m": "chatml"}.get(size.partition(",")[0], "qwen_2")
    return base_of(*sizes_of(size), template, tiny=size.partition(",")[0] == "tiny")


def sizes_of(size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of the language model and of the encoder of a size, as `base_of` takes them.

    Args:
      size: a language model of LLM_SIZES, alone or with an encoder of VISION_SIZES ("vicuna-7b,clip_vit_l_336"). The
        default encoder is FastViTHD.

    Raises:
      ValueError: the size is unknown.
    """
    llm, _, vision = size.partition(",")
    vision = vision or ("tiny" if llm == "tiny" else "fastvithd")
    if llm not in LLM_SIZES:
        raise ValueError(f"unknown model size {llm!r}: choose one of {', '.join(LLM_SIZES)} (as in FILE.py:0.5b)")
    if vision not in VISION_SIZES:
        raise ValueError(
            f"unknown encoder {vision!r}: choose one of {', '.join(VISION_SIZES)} (as in FILE.py:0.5b,mci2)"
        )
    return {**QWEN2, **LLM_SIZES[llm]}, dict(VISION_SIZES[vision])


def base_of(
    llm: Mapping[str, Any], vision: Mapping[str, Any], template: str, *, tiny: bool = False
) -> ml_collections.ConfigDict:
    """Returns the config of any sizes, which a stage file overrides.

    Args:
      llm: arguments of models.decoder.Decoder.
      vision: "family" (see models.fastvlm.make_encoder) and arguments of that encoder.
      template: conversation template.
      tiny: whether the model is meant for a CPU: float32, nothing recomputed, parameters whole on every device.
    """
    c = ml_collections.ConfigDict()
    c.stage = ""  # name of the stage, recorded in the lineage of its model
    c.seed = 0  # seed of the initial weights, the data order and the randomness of the steps
    # Source of the initial weights: a training workdir, a checkpoint, a model directory of any layout, or parts of
    # several ("vision=DIR,llm=DIR"). Parts that no source gives are initialized; "" initializes all.
    c.parent = ""
    c.model = _model(llm, vision, tiny=tiny)
    c.data = _data(vision, template)
    _add_training(c, tiny=tiny)
    return c


def _model(llm: Mapping[str, Any], sizes: Mapping[str, Any], *, tiny: bool) -> ml_collections.ConfigDict:
    model = ml_collections.ConfigDict()
    model.dtype = "float32" if tiny else "bfloat16"  # dtype of the computation
    model.vision = ml_collections.ConfigDict(dict(sizes))
    if "family" not in sizes:
        # The paper does not say in which form, or with which BatchNorm statistics, it tunes the tower in a VLM. The
        # public code builds the folded form; frozen statistics make the loss independent of mesh and batch.
        model.vision.form = "folded"  # "branched" = training form, "folded" = released form
        model.vision.batch_norm = "frozen"  # "train" = batch statistics, updated; "frozen" = stored statistics
        model.vision.drop_path = 0.0  # drop-path rate of the last block; earlier blocks have less, linearly
        # Earlier stages whose pooled outputs join the features (paper, Figure 2).
        model.vision.multiscale = sizes.get("multiscale", ())
        # Pooling of those outputs: "average", or "depthwise" with learned weights.
        model.vision.multiscale_pool = sizes.get("multiscale_pool", "average")
    # Mean of each colour channel that the encoder subtracts from images in [0, 1]; FastVLM's own encoder uses 0.
    model.vision.image_mean = sizes.get("image_mean", (0.0, 0.0, 0.0))
    # Standard deviation of each colour channel that the encoder then divides by.
    model.vision.image_std = sizes.get("image_std", (1.0, 1.0, 1.0))
    # Activations of the encoder that the backward pass recomputes: a policy of models/remat.py.
    model.vision.remat = "none" if tiny else "full" if "family" in sizes else "depthwise"
    model.llm = ml_collections.ConfigDict(dict(llm))
    # Activations of the decoder that the backward pass recomputes: a policy of models/remat.py.
    model.llm.remat = "none" if tiny else "full"
    return model


def _data(sizes: Mapping[str, Any], template: str) -> ml_collections.ConfigDict:
    data = ml_collections.ConfigDict()
    data.path = ""  # folder of one data set's shards, local or gs://; it replaces the mixture
    data.root = "data"  # folder or gs:// prefix that holds the mixture's folders
    # Data sets to mix, as ((folder, fraction of the records drawn), ...); with all fractions 0, an epoch draws each
    # record of each data set once.
    data.mixture = ()
    # tokenizer.model, tokenizer.json, a GGUF file, or a folder or workdir that holds one; "" takes the parent's, else
    # the data folder's.
    data.tokenizer = ""
    # Conversation template: qwen_2, vicuna_v1, chatml or plain.
    data.template = template
    # Side of the square that images are padded and resized to, pixels; a vision transformer takes one size only.
    data.image_size = sizes.get("image_size", 1024)
    # Resolutions to draw batches at, as ((512, 0.3), (1024, 0.7)): sides in pixels, and the fraction of image records
    # drawn at each; () draws all at image_size.
    data.resolutions = ()
    # Aspect buckets, as (width, height) pairs ((1, 1), (4, 3), (3, 4)): an image goes to the nearest; () = squares.
    data.aspects = ()
    data.fit = "pad"  # "pad" shows the whole image on a background, "crop" fills the size, "stretch" keeps no aspect
    # AnyRes grids, as (rows, columns) of tiles ((2, 2),): an image becomes an overview and the tiles of the grid that
    # keeps most of its pixels; () = one view an image.
    data.grids = ()
    # What is behind transparent pixels: "white" as in transformers, "drop" shows their stored colours as LLaVA does.
    data.transparency = "white"
    data.decode = "fast"  # "fast" = libjpeg's scaled decoding and OpenCV, "exact" = the pixels of CLIPImageProcessor
    # "conversation" makes one segment of all questions of a record, "separate" a segment of each question.
    data.turns = "conversation"
    # "truncate" removes the oldest questions of a text that is longer than a row, "reject" replaces its record.
    data.overlong = "truncate"
    data.max_substituted = 0.01  # fraction of records that may be unusable, and so replaced, before training stops
    data.groups = 128  # G: groups in a global batch; a multiple of the mesh's data shards, replica x data x fsdp
    # N: image slots per group at image_size; groups of smaller images get more slots; each tile takes one.
    data.images_per_group = 1
    data.rows_per_group = 1  # R: rows of text in a group
    data.row_length = 2048  # T: tokens in a row
    data.cache_images = False  # keeps decoded images in memory; for small data sets
    data.num_threads = 2  # threads that build batches
    data.prefetch = 4  # batches built ahead
    return data


def _add_training(c: ml_collections.ConfigDict, *, tiny: bool) -> None:
    # Parameter groups, as (path regex, peak learning rate, weight decay): the first match wins, rate 0 freezes. Every
    # parameter must match.
    c.groups = ((".*", 2e-5, 0.0),)
    c.epochs = 1.0  # passes over the training split
    c.steps = 0  # optimizer steps; 0 = as many as `epochs` asks for
    # Fraction of the steps in which the rate rises linearly from 0; a cosine to zero follows. 0 = no warm-up.
    c.warmup_ratio = 0.03
    c.beta1 = 0.9  # AdamW's decay of the first moment
    c.beta2 = 0.999  # AdamW's decay of the second moment
    c.epsilon = 1e-8  # AdamW's epsilon
    c.clip_norm = 1.0  # largest global norm of the gradients of all trainable parameters
    # Devices along (replica, data, fsdp, tensor); -1 = the rest. replica: whole copies, one or more a slice, whose
    # gradients are reduced once between slices. data: copies within a slice. fsdp: parameters and optimizer sharded,
    # gathered layer by layer. tensor: heads and MLP sharded, at most num_kv_heads.
    c.mesh = (1, -1, 1, 1) if tiny else (1, 1, -1, 1)
    c.shard_frozen = True  # False keeps frozen parameters whole on every fsdp device: no gathers, more memory
    c.accumulate = 1  # parts of a batch's groups that are computed one after another: less memory, the same step
    c.param_dtype = "float32"  # dtype of the parameters; "bfloat16" loses updates smaller than 1/256 of a weight
    c.moment_dtype = "float32"  # dtype of Adam's first moment; "bfloat16" saves 2 bytes a trainable parameter

    c.bad_steps = ml_collections.ConfigDict()
    # What is done about a bad step, whose loss or gradient is not finite or whose gradient is a spike: "on" leaves its
    # update out, "warn" only tells of it, "off" does not look.
    c.bad_steps.mode = "on"
    # A gradient is a spike if its norm is above clip_norm and more than so many times the median norm of the last 128
    # steps that were not bad; 0 = none is.
    c.bad_steps.factor = 10.0
    # Bad steps in a row after which a run goes back to its last checkpoint and passes over the batches that failed.
    c.bad_steps.in_a_row = 5
    c.bad_steps.roll_backs = 3  # times that a run goes back to the same checkpoint before it stops with a report

    c.wandb = ""  # Weights & Biases project that also gets the metrics; "" = none
    c.log_every = 10  # steps between logged metrics
    c.checkpoint_every = 1000  # steps between checkpoints; the last step is always saved
    c.keep_checkpoints = 2  # number of latest checkpoints that are kept; with 1, a damaged one has none before it
    c.keep_every = 0  # steps between checkpoints that are kept for good, a multiple of checkpoint_every; 0 = none
    c.eval_every = 1000  # steps between evaluations: of the validation loss and of `evaluate`; the last step has one
    c.eval_batches = 16  # batches of the validation loss; 0 = no validation loss
    # Benchmarks to answer and score, as (("docvqa", "data/docvqa", 500), ...): name, folder of its files, and number of
    # questions, 0 = all. ("qa", "", 50) asks about the held-out split, ("qa", DIR, 50) about another data set.
    c.evaluate = ()
    # Score whose best checkpoint is kept beside the latest: "validation/loss" (the lowest) or, of a benchmark above,
    # "evaluate/docvqa" (the highest); "" = none.
    c.keep_best = ""
    c.stop_after = 0  # evaluations in a row without a better keep_best after which the run ends; 0 = never


def fit_rows(config: ml_collections.ConfigDict, samples: int, images: int, text: int) -> None:
    """Sets data.groups, images_per_group and row_length for packed batches of about `samples` samples.

    Args:
      samples: samples in a global batch.
      images: image slots per group, one a sample.
      text: text tokens of an average sample; longer and shorter samples share a row.
    """
    from fastvlm_jax.models.fastvlm import make_encoder

    rows, columns = make_encoder(**config.model.vision.to_dict()).grid(config.data.image_size, config.data.image_size)
    config.data.groups, config.data.images_per_group = samples // images, images
    config.data.row_length = -(-images * (rows * columns + text) // 256) * 256


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the key, for values out of range and settings that contradict each other."""
    for key in REPLACED:
        if key in config:
            raise ValueError(f"there is no key {key!r} any more: {REPLACED[key]}")
    for key in ("log_every", "checkpoint_every", "eval_every", "keep_checkpoints"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be at least 1")
    if config.keep_every < 0 or config.keep_every % config.checkpoint_every:
        raise ValueError(
            f"keep_every={config.keep_every} must be a multiple of checkpoint_every={config.checkpoint_every}: only "
            "checkpoints that are written can be kept"
        )
    for key in ("param_dtype", "moment_dtype"):
        if config[key] not in ("float32", "bfloat16"):
            raise ValueError(f"{key}={config[key]!r} must be float32 or bfloat16")
    bad_steps = config.bad_steps
    if bad_steps.mode not in ("on", "warn", "off"):
        raise ValueError(f"bad_steps.mode={bad_steps.mode!r} must be on, warn or off")
    if not (bad_steps.factor == 0 or 1 < bad_steps.factor < math.inf):
        raise ValueError(f"bad_steps.factor={bad_steps.factor} must be above 1, or 0 to look for no spikes")
    for key, least in (("in_a_row", 1), ("roll_backs", 0)):
        if bad_steps[key] < least:
            raise ValueError(f"bad_steps.{key}={bad_steps[key]} must be at least {least}")
    if config.accumulate < 1 or config.data.groups % config.accumulate:
        raise ValueError(f"accumulate={config.accumulate} must divide data.groups={config.data.groups}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be from 0 to {2**32 - 1}")
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio={config.warmup_ratio} must be from 0 to 1, a fraction of the steps")
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
    _check_evaluation(config)


def _check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError unless `evaluate` has its form, and keep_best and stop_after follow what is evaluated."""
    names = []
    for entry in config.evaluate:
        fine = isinstance(entry, list | tuple) and list(map(type, entry)) == [str, str, int] and entry[2] >= 0
        if not fine:
            raise ValueError(
                f"evaluate={config.evaluate!r} must hold a name, a folder and a number of questions each, as in "
                '(("docvqa", "data/docvqa", 500),), with 0 for all questions'
            )
        if not entry[1] and entry[0] != "qa":
            raise ValueError(f"evaluate names no folder for {entry[0]}: only qa asks about the run's own data")
        names.append(entry[0])
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"evaluate names {twice[0]} twice: its scores would have the same name")
    scores = [f"evaluate/{name}" for name in names] + ["validation/loss"] * (config.eval_batches > 0)
    if config.keep_best and config.keep_best not in scores:
        known = f"choose {' or '.join(scores)}" if scores else "set `evaluate` or eval_batches too"
        raise ValueError(f"keep_best={config.keep_best!r} is not evaluated in this run: {known}")
    if config.stop_after < 0:
        raise ValueError(f"stop_after={config.stop_after} must be at least 0")
    if config.stop_after and not config.keep_best:
        raise ValueError(f"stop_after={config.stop_after} needs a score to follow: set keep_best, as in evaluate/qa")


def _pairs(data: ml_collections.ConfigDict, key: str, what: str, whole: int) -> list[tuple]:
    """Returns the pairs of a setting; ValueError unless all are positive and the first `whole` of each are integers."""
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
    """Returns the config as dicts, lists and scalars that JSON can hold."""

    def convert(value):
        if isinstance(value, ml_collections.ConfigDict | dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    return convert(config)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns (dotted key, value in a, value in b) where two plain configs differ; a missing key has the value None."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append((prefix + key, x, y))
    return found
