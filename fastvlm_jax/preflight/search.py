"""Ranks meshes, remat policies, groups and accumulation by arithmetic, so that only the best need to be compiled."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections

from fastvlm_jax import optim, sharding
from fastvlm_jax.models import fastvlm, flops, kinds, remat
from fastvlm_jax.preflight import fit
from fastvlm_jax.preflight.topology import Slice

# For ranking only: fraction of the peak at which model FLOPs run, from programs that were compiled (docs/kernels.md).
ENCODER, DECODER = {"v5e": 0.287, "v5p": 0.247, "v6e": 0.105}, 0.6
OTHER_ENCODER = 0.2  # the same on v4 and v7x, a guess
WIDE = 3584  # width of the decoder that reaches DECODER; one of 896 reaches two thirds of it
HIDDEN = {"v5e": 0.9}  # part of the transfers that run beside the computation; none on other generations
# FastViTHD's forward and backward pass with 8 images of 1024 px on a v5e chip, by remat policy: COST is the relative
# time, KEPT the activations kept per block, in multiples of the block's input. "attention" and "none" are guesses.
COST = {"depthwise": 1.0, "dots": 1.10, "attention": 1.09, "full": 1.09}
KEPT = {"depthwise": 2.05, "dots": 1.45, "attention": 1.05, "full": 1.0, "none": 3.5}
LARGEST = 7  # what the backward pass of the largest block holds, in multiples of its input
# The relative time per image with fewer images than 8: 1.09 with 4, 1.19 with 2, 1.25 with 1.
FULL_TILES, HALF_EMPTY = 8, 1.2
LOGITS = 2**29  # bytes of float32 logits and their gradient, in the chunks of the loss


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Holds settings to try, with arithmetic estimates of their cost.

    Attributes:
      settings: values by config key.
      bytes: bytes on one device.
      seconds: seconds per step.
    """

    settings: dict[str, Any]
    bytes: float
    seconds: float

    def apply(self, config) -> ml_collections.ConfigDict:
        """Returns a copy of the config with these settings."""
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(self.settings)
        return changed


class Shards(NamedTuple):
    """Holds counts of parameters.

    Attributes:
      own: parameters on one device.
      learning: trainable parameters on one device.
      all: parameters of the whole model.
    """

    own: int
    learning: int
    all: int


def rank(config, slices: Slice) -> list[Candidate]:
    """Returns the candidates that fit by arithmetic, fastest first; if none fits, all of them, smallest memory first.

    The batch keeps its samples, but may be regrouped to suit the mesh.

    Raises:
      ValueError: no mesh of this slice divides the batch and the model.
    """
    model = kinds.build(**config.model.to_dict())
    boxed = kinds.boxed_variables(model)["params"]
    trainable = optim.split(nn.unbox(boxed), config.groups)[0].keys()
    learns = any(path.startswith("vision/") for path in trainable)
    data, found = config.data, []

    @functools.cache
    def work(llm_remat: str, rows: int, length: int) -> dict[str, float]:
        parts = config.model.to_dict()
        parts["llm"] |= {"remat": llm_remat}
        if "embed_dims" in config.model.vision:
            parts["vision"] |= {"remat": "none"}  # COST includes the recomputation
        images = data.groups * data.images_per_group
        sizes = (images, data.image_size, data.image_size, rows, length)
        return flops.hardware_flops(fastvlm.build(**parts), trainable, *sizes)

    for settings, shards in _candidates(config, slices, boxed, learns):
        length = settings["data.row_length"]
        tokens = settings["data.groups"] * data.rows_per_group * length
        total = work(settings["model.llm.remat"], tokens // length, length)
        found.append(
            Candidate(
                settings,
                _memory(config, settings, shards, tokens, learns),
                _seconds(config, slices, settings, shards, tokens, total),
            )
        )
    if not found:
        samples = data.groups * data.images_per_group
        raise ValueError(
            f"--search regroups the batch for each mesh, but no mesh of {slices.name} divides {samples} images, in "
            f"groups of {data.images_per_group} with {data.rows_per_group} rows (groups need images, and one row): "
            "change --config.data.groups, or leave out --search"
        )
    limit = 0.95 * slices.generation.hbm_limit
    fitting = sorted((c for c in found if c.bytes <= limit), key=lambda c: (c.seconds, c.bytes))
    return fitting or sorted(found, key=lambda c: c.bytes)


def _candidates(config, slices: Slice, boxed, learns: bool) -> Iterator[tuple[dict[str, Any], Shards]]:
    """Yields settings, with the number of parameters on each device of their mesh.

    A frozen encoder has no backward pass, so its remat policy is not varied.
    """
    llm, devices = config.model.llm, slices.num_devices // slices.num_slices
    policies = ("none", *remat.POLICIES)
    choices = [policies if "remat" in config.model[part] else ("none",) for part in ("vision", "llm")]
    if not learns:
        choices[0] = (config.model.vision.get("remat", "none"),)
    for tensor in _divisors(math.gcd(llm.num_kv_heads, devices)):
        for fsdp in _divisors(devices // tensor):
            mesh = (slices.num_slices, devices // tensor // fsdp, fsdp, tensor)
            grouped = fit.regrouped(config, math.prod(mesh[:3]))
            shards = _shards(config, boxed, mesh) if grouped else None
            if shards is None:
                continue
            own = grouped["groups"] // math.prod(mesh[:3])
            for vision_remat, llm_remat, parts in itertools.product(*choices, _divisors(own)):
                settings = {"mesh": mesh, "accumulate": parts, "model.llm.remat": llm_remat}
                if "remat" in config.model.vision:
                    settings["model.vision.remat"] = vision_remat
                yield settings | {f"data.{key}": value for key, value in grouped.items()}, shards


def _shards(config, boxed, mesh: tuple[int, ...]) -> Shards | None:
    """Counts exactly the parameters on one device of a mesh; None if the mesh does not divide one of them."""
    abstract = sharding.abstract_mesh(mesh)
    try:
        _, frozen = optim.split(nn.unbox(boxed), config.groups)
        layouts = sharding.shardings_of(boxed, abstract, (set() if config.shard_frozen else frozen.keys()).__contains__)
    except ValueError:
        return None
    params = nn.unbox(boxed)
    own = jax.tree.map(lambda x, layout: math.prod(layout.shard_shape(x.shape)), params, layouts)
    learning = sum(optim.split(own, config.groups)[0].values())
    return Shards(sum(jax.tree.leaves(own)), learning, sum(math.prod(x.shape) for x in jax.tree.leaves(params)))


def _memory(config, settings: dict[str, Any], shards: Shards, tokens: int, learns: bool) -> float:
    """Estimates the bytes on a device: state, gradients, loss, a layer's gathered weights, kept activations."""
    llm, data, tensor = config.model.llm, config.data, settings["mesh"][3]
    turns = math.prod(settings["mesh"][:3]) * settings["accumulate"]
    weight, moment = (2 if config[key] == "bfloat16" else 4 for key in ("param_dtype", "moment_dtype"))
    second = 4 if config.optimizer == "adamw" else 0  # Adafactor keeps rows and columns of it, and Lion nothing
    average = 4 if config.ema else 0
    state = weight * shards.own + (moment + second + average) * shards.learning
    gradients = 4 * shards.learning * (2 if settings["accumulate"] > 1 else 1)
    layer = 2 * llm.width**2 + 3 * llm.width * llm.mlp_dim
    gathered = (6 * llm.vocab_size * llm.width + 8 * layer) / tensor
    images = data.groups * data.images_per_group / turns
    policy = settings.get("model.vision.remat", "none")
    kept = images * _encoder_bytes(config.model.vision, policy, data.image_size) * learns
    return state + gradients + LOGITS + gathered + kept + tokens / turns * _decoder_bytes(llm, settings) / tensor


def _seconds(config, slices: Slice, settings, shards: Shards, tokens: int, work: dict[str, float]) -> float:
    """Estimates the seconds of a step: computation or transfers, whichever is longer, and what shows of the other."""
    llm, (replica, width, fsdp, tensor), parts = config.model.llm, settings["mesh"], settings["accumulate"]
    peak = slices.generation.flops * slices.chips
    # Devices along the tensor axis share the decoder's work, but each encodes all images of its data shard.
    encoder = tensor * work["vision"] / peak * _encoder_cost(config, slices, settings)
    share = DECODER * min(1, (llm.width / WIDE) ** 0.3)
    busy = encoder + (sum(work.values()) - work["vision"]) / share / peak
    # A scan writes the activations it keeps into a stack and reads them slice by slice; the compiler also copies them.
    kept = tokens / math.prod(settings["mesh"][:3]) * llm.num_layers * _layer_bytes(llm, settings) / tensor
    busy += 8 * kept / slices.generation.hbm_bandwidth
    # Each part gathers weights in bfloat16, forward and backward, and reduces float32 gradients, over two links.
    moved = parts * (4 + 4 * shards.learning / shards.own) * shards.all / tensor * (fsdp > 1)
    moved += 8 * parts * shards.learning * (width > 1)
    moved += 16 * tokens / (replica * width * fsdp) * llm.width * llm.num_layers * (tensor > 1)
    transfers = (
        moved / (2 * slices.generation.link) + 8 * parts * shards.learning * (replica > 1) / slices.generation.dcn
    )
    # Smaller parts use the chip less well: of settings with equal cost, the one with fewer parts is better.
    shown = 1 - HIDDEN.get(slices.name.partition(":")[0], 0.0)
    return (1 + 0.01 * (parts - 1)) * (max(busy, transfers) + shown * min(busy, transfers))


def _encoder_cost(config, slices: Slice, settings: dict[str, Any]) -> float:
    """Returns the encoder's time as a multiple of the time that its FLOPs take at the peak."""
    if "embed_dims" not in config.model.vision:
        return 1 / DECODER
    images = config.data.groups * config.data.images_per_group
    at_a_time = images / math.prod(settings["mesh"][:3]) / settings["accumulate"]
    policy = settings.get("model.vision.remat", "none")
    share = ENCODER.get(slices.name.partition(":")[0], OTHER_ENCODER)
    return COST.get(policy, 1.0) * (1 if at_a_time >= FULL_TILES else HALF_EMPTY) / share


def _decoder_bytes(llm, settings: dict[str, Any]) -> float:
    """Returns the bytes per token that all layers keep, plus the bytes of one layer's backward pass."""
    whole = _layer_bytes(llm, {"model.llm.remat": "none"})
    return llm.num_layers * _layer_bytes(llm, settings) + 2 * whole


def _layer_bytes(llm, settings: dict[str, Any]) -> float:
    """Returns the bytes per token that a layer keeps, in bfloat16: a rough count of its activations."""
    kv = 2 * llm.num_kv_heads * llm.width // llm.num_heads
    whole = 8 * llm.width + 2 * kv + 5 * llm.mlp_dim
    kept = {
        "full": llm.width,
        "attention": 2 * llm.width,
        "dots": 4 * llm.width + kv + 2 * llm.mlp_dim,
    }
    return 2 * kept.get(settings["model.llm.remat"], whole)


def _encoder_bytes(vision, policy: str, side: int) -> float:
    """Returns the bytes per image that the encoder keeps, in bfloat16, plus those of its largest block; see KEPT."""
    if "embed_dims" not in vision or "remat" not in vision:
        return 2.0 * 2**20 * side
    stem = 2 * (side / 2) ** 2 * vision.embed_dims[0]
    blocks = [2 * dim * (side / (4 * 2**i)) ** 2 for i, dim in enumerate(vision.embed_dims)]
    return stem + LARGEST * max(blocks) + KEPT[policy] * sum(map(operator.mul, vision.layers, blocks))


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def choose(candidates: list[Candidate], own: dict[str, Any], count: int) -> list[Candidate]:
    """Chooses the config's own candidate and the first `count` others, of different meshes or remat policies.

    Of candidates that differ only in grouping or accumulation, the first one counts. The config's own is missing if
    arithmetic has ruled it out.

    Args:
      candidates: all candidates, in the order of `rank`.
      own: the config's own settings, as `given` returns them.
    """
    chosen = {}
    for candidate in candidates:
        s = candidate.settings
        chosen.setdefault((s["mesh"], s.get("model.vision.remat"), s["model.llm.remat"]), candidate)
    kept = [c for c in candidates if not differing(c.settings, own)]
    return kept + [c for c in chosen.values() if c not in kept][:count]


def given(config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the config's own values of the ranked keys; the mesh with all its sizes."""
    keys = ("accumulate", "model.llm.remat", "model.vision.remat")
    keys += ("data.groups", "data.images_per_group", "data.row_length")
    flat = {key: functools.reduce(lambda part, name: part.get(name), key.split("."), config) for key in keys}
    return {"mesh": tuple(mesh.shape.values()), **flat}


def differing(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that differ from the config's own."""
    return {key: value for key, value in settings.items() if value != own[key]}


def flags(settings: dict[str, Any], own: dict[str, Any]) -> str:
    """Returns the settings that differ from the config's own, as flags of `fastvlm train`."""
    return " ".join(
        f"--config.{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in differing(settings, own).items()
    )
