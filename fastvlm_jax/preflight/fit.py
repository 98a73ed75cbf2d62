"""Finds settings that would make a program fit, by arithmetic on the compiler's report of one that does not."""

import math
from typing import Any

from fastvlm_jax.chips import GENERATIONS, GiB
from fastvlm_jax.models.fastvlm import make_encoder
from fastvlm_jax.preflight.topology import Slice


def regrouped(config, shards: int, accumulate: int = 1) -> dict[str, int]:
    """Regroups the same samples so that the shards divide the groups.

    If the number of samples per row changes, the text tokens per sample stay the same, and the row length is rounded up
    to a multiple of 256 tokens.

    Args:
      shards: number of data shards.
      accumulate: number of accumulation steps, which must divide the groups of each shard.

    Returns:
      {"groups", "images_per_group", "row_length"}, or {} if no grouping works or groups have several rows or no images.
    """
    data = config.data
    if "text" in config.model:
        return _regrouped_pairs(config, shards * accumulate)
    if data.rows_per_group != 1 or data.images_per_group < 1:
        return {}
    rows, columns = make_encoder(**config.model.vision.to_dict()).grid(data.image_size, data.image_size)
    samples, per_image = data.groups * data.images_per_group, rows * columns
    text = max(0, data.row_length // data.images_per_group - per_image)
    for images in range(data.images_per_group, 0, -1):
        if samples % images == 0 and samples // images % (shards * accumulate) == 0:
            same = images == data.images_per_group
            length = data.row_length if same else -(-images * (per_image + text) // 256) * 256
            return {"groups": samples // images, "images_per_group": images, "row_length": length}
    return {}


def _regrouped_pairs(config, parts: int) -> dict[str, int]:
    """Regroups the same pairs so that `parts` divides the groups, none of which splits a group of BatchNorm."""
    data = config.data
    pairs, together = data.groups * data.images_per_group, max(config.model.vision.get("batch_norm_images", 1), 1)
    for images in range(data.images_per_group, 0, -1):
        whole = images % together == 0 or config.accumulate == 1
        if pairs % images == 0 and pairs // images % parts == 0 and whole:
            return {"groups": pairs // images, "images_per_group": images}
    return {}


def mends(config, slices: Slice, mesh, report: dict[str, Any]) -> list[str]:
    """Lists settings and slices that would fit, each on its own, as flags with estimated memory.

    The state is divided by its shards; activations are scaled with the work of a device.
    """
    m, devices = report["memory"], mesh.devices.size
    limit, state, rest = m["limit"], m["state"], m["total"] - m["state"]
    replica, data, fsdp, tensor = mesh.devices.shape
    shards = replica * data * fsdp
    own_groups = config.data.groups // shards // config.accumulate
    gradients = 4 * report["parameters"]["trainable"] / (fsdp * tensor)
    found = []
    for parts in (n for n in range(2, own_groups + 1) if own_groups % n == 0):
        total = state + gradients + rest / parts
        if total <= limit and not _split_by(config):
            found.append(f"--config.accumulate={config.accumulate * parts}  about {total / GiB:.1f} GiB")
            break
    for part in ("vision", "llm", "text"):
        if config.model.get(part, {}).get("remat", "full") != "full":
            found.append(f"--config.model.{part}.remat=full  (now {config.model[part].remat})")
    for more in (n for n in range(2, data + 1) if data % n == 0):
        if state / more + rest <= limit:
            sizes = (replica, data // more, fsdp * more, tensor)
            found.append(f"--config.mesh={','.join(map(str, sizes))}  about {(state / more + rest) / GiB:.1f} GiB")
            break
    saved = 2 * report["parameters"]["trainable"] / (fsdp * tensor)
    if config.moment_dtype == "float32" and m["total"] - saved <= limit:
        found.append(f"--config.moment_dtype=bfloat16  about {(m['total'] - saved) / GiB:.1f} GiB")
    return found + _slices(config, slices, devices, shards, state, rest)


def _split_by(config) -> bool:
    """Returns whether parts of the batch would split groups of stage 0's BatchNorm, which config_checks refuses."""
    images = config.model.vision.get("batch_norm_images", 0)
    moves = "text" in config.model and config.model.vision.get("batch_norm") == "train"
    return moves and (images < 0 or config.data.images_per_group % images > 0)


def _slices(config, slices: Slice, devices: int, shards: int, state: float, rest: float) -> list[str]:
    """Lists the smallest slice that would hold the program, in this generation and in each with no less memory."""
    samples = config.data.groups * max(1, config.data.images_per_group)
    found = []
    for name, generation in GENERATIONS.items():
        if generation.hbm_limit < slices.generation.hbm_limit:
            continue
        for shape in generation.shapes:
            chips = math.prod(shape)
            share = devices / (chips * generation.devices_per_chip)
            least = shards / samples  # a shard has at least one sample
            total = state * share + rest * max(share, least)
            own = generation is slices.generation
            if total <= generation.hbm_limit and samples % chips == 0 and (chips > slices.chips or not own):
                found.append(f"--topology={name}:{'x'.join(map(str, shape))}  about {total / GiB:.1f} GiB")
                break
    return found
