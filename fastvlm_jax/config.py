"""Names every key of a training config once, with its default and its meaning. Stage files override them.

docs/config.md is made from the assignments and comments in this file: `python -m fastvlm_jax.report.config_keys`.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from fastvlm_jax.models.sizes import CLIP_SIZES, LLM_SIZES, QWEN2, TEXT_SIZES, VISION_SIZES

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
    c = _run()
    c.model = _model(vision, tiny=tiny)
    if "family" not in vision:
        # The paper does not say in which form, or with which BatchNorm statistics, it tunes the tower in a VLM. The
        # public code builds the folded form; frozen statistics make the loss independent of mesh and batch.
        c.model.vision.form = "folded"  # "branched" = training form, "folded" = released form
        c.model.vision.batch_norm = "frozen"  # "train" = batch statistics, updated; "frozen" = stored statistics
        c.model.vision.drop_path = 0.0  # drop-path rate of the last block; earlier blocks have less, linearly
        # Earlier stages whose pooled outputs join the features (paper, Figure 2).
        c.model.vision.multiscale = vision.get("multiscale", ())
        # Pooling of those outputs: "average", or "depthwise" with learned weights.
        c.model.vision.multiscale_pool = vision.get("multiscale_pool", "average")
    c.model.llm = ml_collections.ConfigDict(dict(llm))
    # Activations of the decoder that the backward pass recomputes: a policy of models/remat.py.
    c.model.llm.remat = "none" if tiny else "full"
    c.data = _data(vision)
    _add_conversations(c.data, template)
    _add_training(c, tiny=tiny)
    _add_lora(c)
    return c


def pairs_of(size: str) -> ml_collections.ConfigDict:
    """Returns the config of stage 0, contrastive pretraining, which a stage file overrides.

    Args:
      size: a size of CLIP_SIZES ("s3"), or an encoder of VISION_SIZES and a text tower of TEXT_SIZES
        ("clip_vit_l_336,768").

    Raises:
      ValueError: the size is unknown.
    """
    vision, _, text = size.partition(",")
    if not text:
        if vision not in CLIP_SIZES:
            raise ValueError(
                f"unknown size {size!r} of both towers: choose one of {', '.join(CLIP_SIZES)}, or an encoder and a "
                "text tower, as in FILE.py:convnext_l,768"
            )
        vision, text = CLIP_SIZES[vision]
    for name, sizes, what in ((vision, VISION_SIZES, "encoder"), (text, TEXT_SIZES, "text tower")):
        if name not in sizes:
            raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(sizes)} (as in FILE.py:mci2,512)")
    sizes, tiny = VISION_SIZES[vision], vision == "tiny"
    c = _run()
    c.model = _model(sizes, tiny=tiny)
    c.model.text = ml_collections.ConfigDict(TEXT_SIZES[text])
    # Activations of the text tower that the backward pass recomputes: a policy of models/remat.py.
    c.model.text.remat = "none" if tiny else "full"
    c.model.sigmoid = False  # whether the loss is SigLIP's, whose logits have a bias, and not CLIP's
    if "family" not in sizes:
        c.model.vision.form, c.model.vision.batch_norm, c.model.vision.drop_path = "branched", "train", 0.0
        # Images whose statistics BatchNorm takes together; they should lie in one device's part of the batch. -1 = all
        # of the batch.
        c.model.vision.batch_norm_images = 256
        c.model.vision.head_features, c.model.vision.head_bias = TEXT_SIZES[text]["features"], True
    c.data = _data(sizes)
    c.data.image_size, c.data.fit = sizes.get("image_size", 256), "crop"
    _add_pairs(c.data)
    c.loss = ml_collections.ConfigDict()
    c.loss.hard = 1.0  # weight of the cross-entropy against the pairs: CLIP's loss
    c.loss.soft = 0.0  # weight of the cross-entropy against the teachers' probabilities: DataCompDR's distillation
    # Teachers, as ((width of the features, factor of the logits), ...), in the order in which a record stores their
    # features.
    c.loss.teachers = ()
    c.loss.block = 0  # columns of the block of logits that a device computes at a time; 0 = 2**21 logits
    c.loss.ring = False  # passes texts around a ring of devices instead of gathering them: less memory, more time
    _add_training(c, tiny=tiny)
    return c


def _run() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.stage = ""  # name of the stage, recorded in the lineage of its model
    c.seed = 0  # seed of the initial weights, the data order and the randomness of the steps
    # Source of the initial weights: a training workdir, a checkpoint, a model directory of any layout, or parts of
    # several ("vision=DIR,llm=DIR"). Parts that no source gives are initialized; "" initializes all.
    c.parent = ""
    return c


def _model(sizes: Mapping[str, Any], *, tiny: bool) -> ml_collections.ConfigDict:
    model = ml_collections.ConfigDict()
    model.dtype = "float32" if tiny else "bfloat16"  # dtype of the computation
    model.vision = ml_collections.ConfigDict(dict(sizes))
    # Mean of each colour channel that the encoder subtracts from images in [0, 1]; FastVLM's own encoder uses 0.
    model.vision.image_mean = sizes.get("image_mean", (0.0, 0.0, 0.0))
    # Standard deviation of each colour channel that the encoder then divides by.
    model.vision.image_std = sizes.get("image_std", (1.0, 1.0, 1.0))
    # Activations of the encoder that the backward pass recomputes: a policy of models/remat.py.
    model.vision.remat = "none" if tiny else "full" if "family" in sizes else "depthwise"
    if sizes.get("family") in (None, "convnext"):
        # TPU kernels of the encoder: "auto" = used on TPUs, "none" = never, "interpret" = everywhere but slowly.
        model.vision.kernels = "auto"
    return model


def _data(sizes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    data = ml_collections.ConfigDict()
    data.path = ""  # folder of one data set's shards, local or gs://; it replaces the mixture
    data.root = "data"  # folder or gs:// prefix that holds the mixture's folders
    # Data sets to mix, as ((folder, fraction of the records drawn), ...); with all fractions 0, an epoch draws each
    # record of each data set once.
    data.mixture = ()
    # tokenizer.model, tokenizer.json, a GGUF file, or a folder or workdir that holds one; "" takes the parent's, else
    # the data folder's. For stage 0 also CLIP's own vocabulary, bpe_simple_vocab_16e6.txt.gz or merges.txt.
    data.tokenizer = ""
    # Side of the square that images are padded and resized to, pixels; a vision transformer takes one size only.
    data.image_size = sizes.get("image_size", 1024)
    data.fit = "pad"  # "pad" shows the whole image on a background, "crop" fills the size, "stretch" keeps no aspect
    # What is behind transparent pixels: "white" as in transformers, "drop" shows their stored colours as LLaVA does.
    data.transparency = "white"
    data.decode = "fast"  # "fast" = libjpeg's scaled decoding and OpenCV, "exact" = the pixels of CLIPImageProcessor
    data.max_substituted = 0.01  # fraction of records that may be unusable, and so replaced, before training stops
    data.groups = 128  # G: groups in a global batch; a multiple of the mesh's data shards, replica x data x fsdp
    # N: image slots per group at image_size; groups of smaller images get more slots; each tile takes one. In stage 0:
    # pairs of an image and its text.
    data.images_per_group = 1
    data.cache_images = False  # keeps decoded images in memory; for small data sets
    data.num_threads = 2  # threads that build batches
    data.prefetch = 4  # batches built ahead
    return data


def _add_conversations(data: ml_collections.ConfigDict, template: str) -> None:
    # Conversation template: qwen_2, vicuna_v1, chatml or plain.
    data.template = template
    # Resolutions to draw batches at, as ((512, 0.3), (1024, 0.7)): sides in pixels, and the fraction of image records
    # drawn at each; () draws all at image_size.
    data.resolutions = ()
    # Aspect buckets, as (width, height) pairs ((1, 1), (4, 3), (3, 4)): an image goes to the nearest; () = squares.
    data.aspects = ()
    # AnyRes grids, as (rows, columns) of tiles ((2, 2),): an image becomes an overview and the tiles of the grid that
    # keeps most of its pixels; () = one view an image.
    data.grids = ()
    # "conversation" makes one segment of all questions of a record, "separate" a segment of each question.
    data.turns = "conversation"
    # "truncate" removes the oldest questions of a text that is longer than a row, "reject" replaces its record.
    data.overlong = "truncate"
    data.rows_per_group = 1  # R: rows of text in a group
    data.row_length = 2048  # T: tokens in a row


def _add_pairs(data: ml_collections.ConfigDict) -> None:
    data.texts = 1  # texts of an image: 1 = its caption, 2 = a synthetic caption too, as in DataCompDR
    # Part of an image that is shown: "none" = all of it, as `fit` says; "random" = a random crop, changed by random
    # operations; "replay" = one of the crops and changes that the record stores with its teachers' features.
    data.augment = "random"
    data.crop_area = (0.08, 1.0)  # smallest and largest fraction of an image's area in a random crop
    data.operations = (2, 9)  # RandAugment's number of operations and their magnitude, 0 to 30; (0, 0) = none


def _add_training(c: ml_collections.ConfigDict, *, tiny: bool) -> None:
    # Parameter groups, as (path regex, peak learning rate, weight decay): the first match wins, rate 0 freezes. Every
    # parameter must match.
    c.groups = ((".*", 2e-5, 0.0),)
    c.epochs = 1.0  # passes over the training split
    c.steps = 0  # optimizer steps; 0 = as many as `epochs` asks for
    # Fraction of the steps in which the rate rises linearly; a cosine follows. 0 = no warm-up.
    c.warmup_ratio = 0.03
    # Rate of the first step of a warm-up of W steps: "transformers" = 0, "open_clip" = 1/W of the peak.
    c.warmup = "transformers"
    c.final_rate = 0.0  # rate behind the last step, as a fraction of the peak
    # "adamw"; "adafactor": big_vision's form, which keeps a row and a column of second moments for a matrix; or "lion",
    # which keeps no second moments. Every update of Lion is as large as its rate: set rates 3 to 10 times lower than
    # AdamW's, weight decay as many times higher, and beta2 to 0.99.
    c.optimizer = "adamw"
    c.beta1 = 0.9  # decay of the first moment; Lion's part of it in an update
    # AdamW's decay of the second moment; for Adafactor its upper limit; Lion's decay of the first moment.
    c.beta2 = 0.999
    c.epsilon = 1e-8  # AdamW's epsilon
    # Parameters that weight decay applies to, by the last part of their paths.
    c.decayed = ("kernel", "embedding")
    # Decay of the moving average of parameters and BatchNorm statistics that evaluations, exports and later stages use;
    # lower in the first steps, min(ema, (1 + step) / (10 + step)). 0 = none, they use the last ones.
    c.ema = 0.0
    c.layer_decay = ml_collections.ConfigDict()
    # Layer-wise decay of the encoder's learning rates: a parameter of layer i of L, see models/depth.py, learns at the
    # rate of its group times layer_decay ** (L - i), as in timm and BEiT. 1 = all at the same rate.
    c.layer_decay.vision = 1.0
    c.layer_decay.llm = 1.0  # the same of the language model
    c.layer_decay.text = 1.0  # the same of stage 0's text tower
    c.clip_norm = 1.0  # largest global norm of the gradients of all trainable parameters
    # Devices along (replica, data, fsdp, tensor); -1 = the rest. replica: whole copies, one or more a slice, whose
    # gradients are reduced once between slices. data: copies within a slice. fsdp: parameters and optimizer sharded,
    # gathered layer by layer. tensor: heads and MLP sharded, at most num_kv_heads.
    c.mesh = (1, -1, 1, 1) if tiny else (1, 1, -1, 1)
    c.shard_frozen = True  # False keeps frozen parameters whole on every fsdp device: no gathers, more memory
    c.accumulate = 1  # parts of a batch's groups that are computed one after another: less memory, the same step
    c.param_dtype = "float32"  # dtype of the parameters; "bfloat16" loses updates smaller than 1/256 of a weight
    # Dtype of frozen kernels and embeddings; "" = bfloat16 with `lora`, else param_dtype.
    c.frozen_dtype = ""
    c.moment_dtype = "float32"  # dtype of the first moment; "bfloat16" saves 2 bytes a trainable parameter

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
    # questions, 0 = all. ("qa", "", 50) asks about the held-out split, ("qa", DIR, 50) about another data set. Stage 0
    # has ("zero-shot", DIR, 0) and ("retrieval", DIR, 500), with a number of pictures, and "" for the held-out split.
    c.evaluate = ()
    # Steps between answers to the same few questions of the held-out split, which show in TensorBoard, in Weights &
    # Biases and in `fastvlm report` how answers change; the last step has some. 0 = none.
    c.predictions_every = 0
    c.num_predictions = 8  # number of these questions
    # Score whose best checkpoint is kept beside the latest: "validation/loss" (the lowest) or, of a benchmark above,
    # "evaluate/docvqa" (the highest); "" = none.
    c.keep_best = ""
    c.stop_after = 0  # evaluations in a row without a better keep_best after which the run ends; 0 = never


def _add_lora(c: ml_collections.ConfigDict) -> None:
    c.lora = ml_collections.ConfigDict()
    # Rank of the adapters that are trained in place of the kernels that `targets` names (LoRA); 0 = none. `groups` must
    # freeze those kernels, as (("lora/.*", 2e-4, 0.0), (".*", 0.0, 0.0)) does, and checkpoints hold only what is
    # trained.
    c.lora.rank = 0
    c.lora.alpha = 16.0  # an adapter's product is multiplied by alpha / rank
    c.lora.stabilised = False  # multiplies it by alpha / sqrt(rank) instead (rsLoRA), so that high ranks learn as fast
    c.lora.dropout = 0.0  # probability with which a number of an adapter's input is left out in training
    # Kernels that get an adapter: a regex of whole paths, as "(llm|vision|projector)/.*", among those of dense layers
    # and of 1x1 convolutions.
    c.lora.targets = "llm/layers/(q|k|v|o|gate|up|down)/kernel"


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
