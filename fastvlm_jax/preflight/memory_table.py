"""Prints the table of docs/gpu.md, which model trains on which card: `python -m fastvlm_jax.preflight.memory_table`.

Every figure is the arithmetic of gpu.py for a step on one card; no compiler takes part and nothing runs. The settings
that save memory are tried in their order, each beside those before, until the smallest card suffices.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app

from fastvlm_jax.bench.page import markdown_table
from fastvlm_jax.chips import GB
from fastvlm_jax.config import fit_rows, get_base
from fastvlm_jax.preflight import gpu
from fastvlm_jax.preflight.describe import gib

MODELS, SIDES, CARDS = ("0.5b", "1.5b", "7b"), (512, 1024), (16, 24, 40, 80)  # names, pixels, GB
SAMPLES, IMAGES, TEXT = 16, 4, 256  # samples of a batch, images of a group and text tokens of a sample, see fit_rows
MORE = 0.9  # share of a card that JAX takes with the first setting
RATE, ADAPTED = 2e-5, 2e-4  # learning rates, which no memory depends on


class Setting(NamedTuple):
    """Describes one of the settings that save memory.

    Attributes:
      letter: its name in docs/gpu.md; "" for none.
      values: keys of the config and their values.
      share: share of the card that JAX takes from here on.
    """

    letter: str
    values: dict[str, Any]
    share: float = MORE


AS_IT_IS, SHARE = Setting("", {}, gpu.SHARE), Setting("S", {})
FROZEN = (("vision/.*", 0.0, 0.0), (".*", RATE, 0.0))
# Accumulation is not among them: it holds all gradients twice, and takes more than it saves of so small a batch.
WHOLE = (
    AS_IT_IS,
    SHARE,
    Setting("R", {"model.vision.remat": "full"}),
    Setting("M", {"moment_dtype": "bfloat16"}),
    Setting("O", {"optimizer": "adafactor"}),
    Setting("E", {"groups": FROZEN}),
    Setting("P", {"param_dtype": "bfloat16"}),
)
ADAPTERS = (AS_IT_IS, SHARE, Setting("A", {"accumulate": SAMPLES // IMAGES}))


class Row(NamedTuple):
    """Holds what a model needs.

    Attributes:
      model, side: name of the model, side of its images in pixels.
      lora: whether adapters are trained.
      bytes: by the arithmetic, with each setting that was tried and those before it.
    """

    model: str
    side: int
    lora: bool
    bytes: tuple[int, ...]


def config_of(model: str, side: int, *, lora: bool):
    """Returns the config of a stage 2 with 16 samples, packed in 4 groups, that trains the whole model or adapters."""
    config = get_base(model)
    config.data.image_size = side
    fit_rows(config, SAMPLES, IMAGES, TEXT)
    config.groups = ((".*", RATE, 0.0),)
    if lora:
        config.lora.rank, config.groups = 16, (("lora/.*", ADAPTED, 0.0), (".*", 0.0, 0.0))
    return config


def settings_of(lora: bool) -> tuple[Setting, ...]:
    """Returns the settings to try for adapters, or for a whole model."""
    return ADAPTERS if lora else WHOLE


def bytes_of(config) -> int:
    """Returns the bytes of a step on one card, without the margin."""
    return sum(gpu.memory(config, gpu.parse("gpu:1GB"))[0].values())


def try_settings(config, settings: Sequence[Setting], smallest: float, need: Callable = bytes_of) -> tuple[int, ...]:
    """Returns what a step needs with each of the settings and those before, up to the first with which it fits.

    Args:
      smallest: bytes of the smallest card.
      need: config -> bytes.
    """
    found: list[int] = []
    for setting in settings:
        config.update_from_flattened_dict(setting.values)
        found.append(need(config) if setting.values or not found else found[-1])
        if fits(found[-1], setting, smallest):
            break
    return tuple(found)


def fits(needed: int, setting: Setting, card: float) -> bool:
    """Returns whether a step fits a card: with the margin, into the share that JAX takes."""
    return gpu.MARGIN * needed <= setting.share * card


def verdict(row: Row, card: float) -> str:
    """Returns "yes", the letters of the settings with which a model fits a card of so many bytes, or "no"."""
    letters = []
    for needed, setting in zip(row.bytes, settings_of(row.lora), strict=False):
        letters.append(setting.letter)
        if fits(needed, setting, card):
            return " ".join(letters).strip() or "yes"
    return "no"


def text(rows: Sequence[Row]) -> str:
    """Returns the table in markdown."""
    head = ["model", "px", "trained", *(f"{card} GB" for card in CARDS), "GiB as it is", "GiB at the least"]
    cells = [
        [
            row.model.upper(), str(row.side), "LoRA" if row.lora else "all",
            *(verdict(row, card * GB) for card in CARDS), gib(row.bytes[0]), gib(min(row.bytes)),
        ]
        for row in rows
    ]  # fmt: skip
    return markdown_table(head, cells)


def main(argv: Sequence[str]) -> None:
    """Traces the steps, which takes some minutes, and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    rows = []
    for model in MODELS:
        for lora in (False, True):
            for side in SIDES:
                print(f"{model}, {side} px, {'LoRA' if lora else 'all'}", file=sys.stderr, flush=True)
                needed = try_settings(config_of(model, side, lora=lora), settings_of(lora), CARDS[0] * GB)
                rows.append(Row(model, side, lora, needed))
    print(text(rows))


if __name__ == "__main__":
    app.run(main)
