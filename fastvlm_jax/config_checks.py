"""Refuses configs whose values are out of range or contradict each other, naming the key."""

import math

import ml_collections

from fastvlm_jax.config import REPLACED
from fastvlm_jax.config_values import lora_of
from fastvlm_jax.models.lora import problem


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the key, for values out of range and settings that contradict each other."""
    for key in REPLACED:
        if key in config:
            raise ValueError(f"there is no key {key!r} any more: {REPLACED[key]}")
    _check_run(config)
    _check_training(config)
    data = config.data
    for key in ("image_size", "groups"):
        if data[key] < 1:
            raise ValueError(f"data.{key}={data[key]} must be at least 1")
    for key in ("images_per_group", "num_threads", "prefetch", "max_substituted"):
        if not data[key] >= 0:
            raise ValueError(f"data.{key}={data[key]} must be at least 0")
    if "text" in config.model:
        _check_pairs(config)
    else:
        _check_conversations(data)
    _check_evaluation(config)


def _check_run(config: ml_collections.ConfigDict) -> None:
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


def _check_training(config: ml_collections.ConfigDict) -> None:
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be from 0 to {2**32 - 1}")
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio={config.warmup_ratio} must be from 0 to 1, a fraction of the steps")
    if config.warmup not in ("transformers", "open_clip"):
        raise ValueError(f"warmup={config.warmup!r} must be transformers or open_clip")
    if not 0 <= config.final_rate <= 1:
        raise ValueError(f"final_rate={config.final_rate} must be from 0 to 1, a fraction of the peak rates")
    if config.optimizer not in ("adamw", "adafactor", "lion"):
        raise ValueError(f"optimizer={config.optimizer!r} must be adamw, adafactor or lion")
    if config.frozen_dtype not in ("", "float32", "bfloat16"):
        raise ValueError(f"frozen_dtype={config.frozen_dtype!r} must be float32, bfloat16, or '' for the default")
    if (adapters := lora_of(config)) and (why := problem(adapters)):
        raise ValueError(f"lora.{why}")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema={config.ema} must be at least 0 and below 1, as 0.9995; 0 keeps no average")
    for tower, decay in config.layer_decay.items():
        if not 0 < decay <= 1:
            raise ValueError(f"layer_decay.{tower}={decay} must be above 0 and at most 1, which lowers no rate")
        if decay < 1 and tower not in config.model:
            raise ValueError(f"layer_decay.{tower}={decay}: this model has no part {tower!r}: leave it at 1")
    if not all(isinstance(name, str) for name in config.decayed):
        raise ValueError(f"decayed={config.decayed} must hold last parts of paths, as ('kernel', 'embedding')")


def _check_conversations(data: ml_collections.ConfigDict) -> None:
    for key in ("rows_per_group", "row_length"):
        if data[key] < 1:
            raise ValueError(f"data.{key}={data[key]} must be at least 1")
    sides = _pairs(data, "resolutions", "sides and positive shares, as ((512, 0.3), (1024, 0.7))", whole=1)
    if len({side for side, _ in sides}) < len(sides):
        raise ValueError(f"data.resolutions={data.resolutions} names a side twice")
    _pairs(data, "aspects", "positive widths and heights, as ((1, 1), (4, 3))", whole=0)
    _pairs(data, "grids", "rows and columns of tiles, as ((2, 2),)", whole=2)


def _check_pairs(config: ml_collections.ConfigDict) -> None:
    data, loss = config.data, config.loss
    if data.images_per_group < 1:
        raise ValueError("data.images_per_group=0 must be at least 1: the pairs of a group")
    if data.texts not in (1, 2):
        raise ValueError(f"data.texts={data.texts} must be 1, the caption, or 2, a synthetic one too")
    if data.augment not in ("none", "random", "replay"):
        raise ValueError(f"data.augment={data.augment!r} must be none, random or replay")
    low, high = _numbers(data, "crop_area", "two fractions of the area, as (0.08, 1.0)")
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.crop_area={data.crop_area} must rise from above 0 to at most 1")
    count, magnitude = _numbers(data, "operations", "a number of operations and their magnitude, as (2, 9)")
    if not (count >= 0 and int(count) == count and 0 <= magnitude <= 30 and int(magnitude) == magnitude):
        raise ValueError(f"data.operations={data.operations} must be a number of operations and a magnitude, 0 to 30")
    for key in ("hard", "soft"):
        if not 0 <= loss[key] < math.inf:
            raise ValueError(f"loss.{key}={loss[key]} must be at least 0")
    if loss.hard + loss.soft == 0:
        raise ValueError("loss.hard and loss.soft are both 0: nothing would be learned")
    if loss.block < 0:
        raise ValueError(f"loss.block={loss.block} must be at least 0")
    teachers = _pairs(loss, "teachers", "widths and factors, as ((768, 100.0), (768, 100.0))", whole=1, section="loss")
    if bool(teachers) != (loss.soft > 0):
        raise ValueError(
            f"loss.soft={loss.soft} and loss.teachers={loss.teachers} contradict each other: distillation needs both a "
            "weight and teachers"
        )
    if teachers and data.augment != "replay":
        raise ValueError(
            f"data.augment={data.augment!r}: loss.teachers saw crops that the records store: set data.augment to "
            "'replay'"
        )
    if config.model.sigmoid and (loss.soft or loss.hard != 1):
        raise ValueError("model.sigmoid takes loss.hard=1 and no distillation: set loss.soft=0 and loss.teachers=()")
    images = config.model.vision.get("batch_norm_images", -1)
    if images == 0 or images < -1:
        raise ValueError(f"model.vision.batch_norm_images={images} must be positive, or -1 for the whole batch")
    pairs = data.groups * data.images_per_group
    if config.model.vision.get("batch_norm") != "train":
        return
    if pairs % images:
        raise ValueError(
            f"model.vision.batch_norm_images={images} does not divide the batch of {data.groups} x "
            f"{data.images_per_group} = {pairs} images"
        )
    if config.accumulate > 1 and images < 0:
        raise ValueError(
            f"accumulate={config.accumulate} computes parts of a batch, which model.vision.batch_norm_images=-1 takes "
            f"whole: set that to a divisor of data.images_per_group={data.images_per_group}"
        )
    if config.accumulate > 1 and data.images_per_group % images:
        raise ValueError(
            f"accumulate={config.accumulate} takes the groups of a batch in turn, so that BatchNorm's lie within one: "
            f"make data.images_per_group={data.images_per_group} a multiple of model.vision.batch_norm_images={images}"
        )


def _check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError unless `evaluate` has its form, and keep_best and stop_after follow what is evaluated."""
    towers, names = "text" in config.model, []
    for entry in config.evaluate:
        fine = isinstance(entry, list | tuple) and list(map(type, entry)) == [str, str, int] and entry[2] >= 0
        if not fine:
            raise ValueError(
                f"evaluate={config.evaluate!r} must hold a name, a folder and a number of questions each, as in "
                '(("docvqa", "data/docvqa", 500),), with 0 for all questions'
            )
        if towers != (entry[0] in ("zero-shot", "retrieval")):
            fitting = "the two towers of stage 0 take zero-shot and retrieval" if towers else "it is for stage 0"
            raise ValueError(f"evaluate names {entry[0]}, which does not fit the model: {fitting}")
        if not entry[1] and entry[0] != "qa" and not towers:
            raise ValueError(f"evaluate names no folder for {entry[0]}: only qa asks about the run's own data")
        names.append(entry[0])
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"evaluate names {twice[0]} twice: its scores would have the same name")
    scores = [f"evaluate/{name}" for name in names] + ["validation/loss"] * (config.eval_batches > 0)
    if config.keep_best and config.keep_best not in scores:
        known = f"choose {' or '.join(scores)}" if scores else "set `evaluate` or eval_batches too"
        raise ValueError(f"keep_best={config.keep_best!r} is not evaluated in this run: {known}")
    if config.predictions_every < 0:
        raise ValueError(f"predictions_every={config.predictions_every} must be at least 0; 0 asks no sample questions")
    if config.predictions_every and towers:
        raise ValueError(f"predictions_every={config.predictions_every}: stage 0 answers no questions: set it to 0")
    if config.num_predictions < 1:
        raise ValueError(f"num_predictions={config.num_predictions} must be at least 1; predictions_every=0 asks none")
    if config.stop_after < 0:
        raise ValueError(f"stop_after={config.stop_after} must be at least 0")
    if config.stop_after and not config.keep_best:
        raise ValueError(f"stop_after={config.stop_after} needs a score to follow: set keep_best, as in evaluate/qa")


def _pairs(data: ml_collections.ConfigDict, key: str, what: str, whole: int, section: str = "data") -> list[tuple]:
    """Returns the pairs of a setting; ValueError unless all are positive and the first `whole` of each are integers."""
    try:
        pairs = [(first, second) for first, second in data[key]]
        fine = all(isinstance(x, int) for pair in pairs for x in pair[:whole])
        fine &= all(0 < x < math.inf for pair in pairs for x in pair)
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{section}.{key}={data[key]} must be pairs of {what}")
    return pairs


def _numbers(data: ml_collections.ConfigDict, key: str, what: str) -> tuple[float, float]:
    """Returns the two numbers of a setting; ValueError if it holds anything else."""
    try:
        first, second = data[key]
        if math.isfinite(first) and math.isfinite(second):
            return first, second
    except (TypeError, ValueError):
        pass
    raise ValueError(f"data.{key}={data[key]} must be {what}")
