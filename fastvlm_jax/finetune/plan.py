"""Chooses the settings of a fine-tuning run from its model, its data and the memory of the machine, and says why."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections

from fastvlm_jax import model_io
from fastvlm_jax.finetune.facts import TURNS, Facts
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvlm import make_encoder
from fastvlm_jax.parent import open_base
from fastvlm_jax.preflight import gpu
from fastvlm_jax.preflight.describe import gib

SAMPLES, FEW = 16, 160  # records of a batch, or half as many of a data set with fewer than FEW
STEPS, EPOCHS = 100, (3, 20)  # least number of steps that is aimed at, and the bounds of the epochs for it
# Rate for a language model of WIDTH channels, as in the paper's stage 2; narrower ones learn well with higher rates, so
# it grows with the square of the ratio, up to the highest.
WIDTH, RATE, HIGHEST = 896, 2e-5, 1e-3
ADAPTED, HIGHEST_ADAPTED = 10, 5e-3  # rate of adapters in multiples of that rate, and the highest
RANK, ALPHA = 16, 32.0
TARGETS = "(llm/layers|projector)/.*"
# Metric of benchmarks.qa -> most words of the median answer that it is for.
METRICS = {"exact": 3, "anls": 10}


class Choice(NamedTuple):
    """Describes a setting: the key of the config, its value, and the reason in a line."""

    key: str
    value: Any
    why: str


class Plan(NamedTuple):
    """Holds the settings of a run.

    Attributes:
      config: the config with all settings.
      choices: what was set, in order.
      metric: metric of `fastvlm evaluate` that fits the answers.
      remarks: what is worth knowing beside.
    """

    config: ml_collections.ConfigDict
    choices: list[Choice]
    metric: str
    remarks: list[str]


def choose(model: str, data: str, facts: Facts, held_out: int, *, lora: bool, devices: gpu.Gpus) -> Plan:
    """Chooses the settings of a run.

    Args:
      model: the model to tune, a source of `model_io.read`.
      data: folder of the shards.
      facts: what its training split holds.
      held_out: number of records in its validation split.
      lora: whether to train adapters instead of the whole model.
      devices: the devices of this machine and their memory.

    Raises:
      ValueError: the model has no encoder, language model or tokenizer, a record has too many pictures or too much
        text, or no setting fits the memory.
    """
    loaded = model_io.read(model)
    if missing := [part for part in ("vision", "llm") if not loaded.config.get(part)]:
        raise ValueError(f"{model} has no {missing[0]}: give a whole FastVLM")
    if "projector" not in loaded.variables["params"]:
        raise ValueError(f"{model} has no projector: train one with configs/stage1_align.py")
    if loaded.processor is None:
        raise ValueError(f"{model} has no tokenizer: put its tokenizer.json beside its config.json")
    config = open_base(f"parent={model}")
    groups, each = _records(facts, devices.count)
    without = f", {facts.text_only:.0%} of them without any" if facts.text_only else ""
    choices = [
        Choice("stage", "finetune", ""),
        Choice("data.path", data, f"{facts.records:,} records with {facts.pictures:,} pictures{without}"),
        Choice("data.turns", TURNS, "a record shows its pictures once, for all its questions"),
        _size(config, facts),
    ]
    _apply(config, choices)
    choices += _batch(config, facts, groups, each)
    per_epoch = max(1, facts.records // (groups * each))
    choices += _course(config, per_epoch, lora)
    metric = next((name for name, words in METRICS.items() if facts.words <= words), "f1")
    choices += _evaluation(per_epoch, held_out, max(1, held_out // (groups * each)), metric, choices)
    if gpu.is_cpu(devices):
        choices.append(Choice("model.dtype", "float32", "a CPU computes bfloat16 more slowly"))
        if lora:
            choices.append(Choice("frozen_dtype", "float32", "XLA would copy bfloat16 kernels to float32 on a CPU"))
    _apply(config, choices)
    for more in _lighter(config, lora, devices.count):
        tried = config.copy_and_resolve_references()
        _apply(tried, more)
        needed = sum(gpu.memory(tried, devices)[0].values())
        if gpu.margin(devices) * needed <= devices.bytes:
            break
    else:
        smaller = "a smaller model" if lora else "--lora, or a smaller model"
        raise ValueError(
            f"a step of {model} needs {gib(gpu.margin(devices) * needed)} GiB by arithmetic at its least, and a device "
            f"here has {gib(devices.bytes)} GiB: give {smaller}"
        )
    remarks = [
        f"memory of a step: {gib(needed)} GiB by arithmetic, {gpu.margin(devices):g} times that when compiled at most; "
        f"there are {gib(devices.bytes)} GiB"
    ]
    if facts.unusable:
        remarks.append(f"{facts.unusable:,} records cannot be used; `fastvlm data inspect` says why")
    return Plan(tried, [*choices, *more], metric, remarks)


def _apply(config: ml_collections.ConfigDict, choices: list[Choice]) -> None:
    config.update_from_flattened_dict({choice.key: choice.value for choice in choices})


def _size(config: ml_collections.ConfigDict, facts: Facts) -> Choice:
    """Chooses the image size: the model's own, or less if the pictures are smaller; never below half of it."""
    own, encoder = config.data.image_size, make_encoder(**config.model.vision.to_dict())
    stride = getattr(encoder, "stride", None)
    if not stride or not facts.side:
        return Choice("data.image_size", own, "the model's own size")
    wanted = -(-max(facts.side, own // 2) // stride) * stride
    within = f"nine of ten pictures are within {facts.side} px"
    if wanted >= own:
        return Choice("data.image_size", own, f"the model's own size; {within}")
    return Choice("data.image_size", wanted, f"{within}; the model's own is {own}")


def _records(facts: Facts, count: int) -> tuple[int, int]:
    """Returns (groups of a batch, records of a group) for `count` devices."""
    groups = count * max(1, 4 // count)
    return groups, max(1, (SAMPLES if facts.records >= FEW else SAMPLES // 2) // groups)


def _batch(config: ml_collections.ConfigDict, facts: Facts, groups: int, each: int) -> list[Choice]:
    """Chooses groups, image slots and the length of rows for packed batches."""
    encoder, side = make_encoder(**config.model.vision.to_dict()), config.data.image_size
    rows, columns = encoder.grid(side, side)
    pictures = facts.pictures / facts.records
    slots = max(facts.most_pictures, math.ceil(each * pictures), 1)
    mean, longest = rows * columns * pictures + facts.text, rows * columns * facts.most_pictures + facts.longest
    limit = Decoder(**config.model.llm.to_dict()).context_length
    length = -(-max(int(each * mean), min(longest, limit)) // 64) * 64
    if rows * columns * facts.most_pictures >= limit:
        raise ValueError(
            f"a record has {facts.most_pictures} pictures, {rows * columns} tokens each, and the model reads {limit:,} "
            "tokens: split such records"
        )
    return [
        Choice("data.groups", groups, f"with the image slots a batch of about {groups * each} records"),
        Choice("data.images_per_group", slots, f"a record has {pictures:.2g} pictures, at most {facts.most_pictures}"),
        Choice("data.row_length", length, f"a record has {mean:,.0f} tokens with its pictures, at most {longest:,}"),
    ]


def _course(config: ml_collections.ConfigDict, per_epoch: int, lora: bool) -> list[Choice]:
    """Chooses epochs and rates."""
    epochs = min(max(math.ceil(STEPS / per_epoch), EPOCHS[0]), EPOCHS[1])
    rate = min(RATE * max(1.0, WIDTH / config.model.llm.width) ** 2, HIGHEST)
    found = [Choice("epochs", float(epochs), f"about {epochs * per_epoch} steps; keep_best guards against too many")]
    if not lora:
        return [*found, Choice("groups", ((".*", float(f"{rate:.1g}"), 0.0),), "the whole model learns")]
    rate = min(ADAPTED * rate, HIGHEST_ADAPTED)
    return [
        *found,
        Choice("lora.rank", RANK, "adapters learn in place of the weights"),
        Choice("lora.alpha", ALPHA, "twice the rank, as is usual"),
        Choice("lora.targets", TARGETS, "the language model and the projector"),
        Choice("groups", (("lora/.*", float(f"{rate:.1g}"), 0.0), (".*", 0.0, 0.0)), "all else stays as it is"),
    ]


def _evaluation(per_epoch: int, held_out: int, batches: int, metric: str, choices: list[Choice]) -> list[Choice]:
    """Chooses when the run is evaluated, about eight times, and on what."""
    epochs = next(choice.value for choice in choices if choice.key == "epochs")
    every = max(5, math.ceil(epochs * per_epoch / 8))
    found = [Choice("log_every", max(1, every // 5), ""), Choice("checkpoint_every", every, "")]
    if not held_out:
        return found
    found += [
        Choice("eval_every", every, f"{held_out} records are held out"),
        Choice("eval_batches", min(8, batches), "batches of the loss of the held-out records"),
        Choice("keep_best", "validation/loss", "the checkpoint that is evaluated and used"),
    ]
    if metric == "exact":
        found.append(Choice("evaluate", (("qa", "", 50),), "the answers are short: their exact match is followed too"))
    return found


def _lighter(config: ml_collections.ConfigDict, lora: bool, count: int) -> Iterator[list[Choice]]:
    """Yields further settings, the fastest first and then those that take less and less memory."""
    why = "nothing is computed twice: the memory suffices"
    none = [Choice(f"model.{part}.remat", "none", why) for part in ("vision", "llm")]
    yield none
    yield []
    parts = [n for n in (2, 4, 8, 16) if config.data.groups % (count * n) == 0]
    less = []
    for count in parts:
        less = [Choice("accumulate", count, "parts of a batch one after another, for less memory")]
        yield less
    less = [*less, Choice("model.vision.remat", "full", "activations are computed again, for less memory")]
    yield less
    if not lora:
        less = [*less, Choice("moment_dtype", "bfloat16", "for less memory")]
        yield less
        groups = (("vision/.*", 0.0, 0.0), (".*", config.groups[0][1], 0.0))
        yield [*less, Choice("groups", groups, "the encoder stays as it is, for less memory")]


def devices_here() -> gpu.Gpus:
    """Returns the devices of this machine with the memory that a run may take of each."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return gpu.Gpus("this machine", jax.device_count(), limit)
    return gpu.Gpus("cpu", jax.device_count(), gpu.memory_here() / jax.device_count())
