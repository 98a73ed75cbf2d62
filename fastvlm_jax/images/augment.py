"""Samples the parameters of RandomResizedCrop and RandAugment from (seed, epoch, record), and applies them.

The parameters stored with a teacher's embeddings (DataCompDR's paug.json) reproduce the pixels that the teacher saw.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastvlm_jax.images.operations import OPS, apply
from fastvlm_jax.images.resize import fit_into

MAX_OPS = 100  # of one entry of param_aug; published ones have two
MAX_MAGNITUDE = 30  # of an operation; 0 is the weakest
_SIGNED = {  # values at the highest magnitude; half of the samples get the opposite sign
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331,  # fraction of the width
    "TranslateY": 150 / 331,  # fraction of the height
    "Rotate": 30.0,  # degrees
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}

Op = tuple[str, float]  # a name in OPS and its magnitude


class Crop(NamedTuple):
    """Describes a rectangle of an image, in the image's pixels."""

    top: int
    left: int
    height: int
    width: int


def uniform(seed: int, epoch: int, record: int, count: int) -> np.ndarray:
    """Returns the random numbers of one record in one epoch, float64 [count] in [0, 1).

    They are the upper 53 bits of raw Philox4x64-10 words with the key (seed, epoch), from the counter (0, record, 0, 0)
    on. NumPy keeps raw words the same in all its versions, but does not promise the same for its Generator's methods.

    Raises:
      ValueError: a number is negative or takes more than 64 bits.
    """
    if not all(0 <= number < 2**64 for number in (seed, epoch, record)):
        raise ValueError(f"seed, epoch and record must be 0 to 2^64 - 1: {seed}, {epoch}, {record}")
    key = np.array([seed, epoch], np.uint64)
    words = np.random.Philox(key=key, counter=np.array([0, record, 0, 0], np.uint64)).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def sample(
    seed: int,
    epoch: int,
    record: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    num_ops: int = 2,
    magnitude: int = 9,
    scale: tuple[float, float] = (0.08, 1.0),
) -> tuple[Crop, tuple[Op, ...]]:
    """Samples the crop and the operations of one record in one epoch; equal arguments always give the same result.

    Args:
      seed, epoch, record: see `uniform`.
      size: (height, width) of the image, pixels.
      out_size: (height, width) that the crop is resized to, pixels.
      num_ops, magnitude: see `sample_ops`.
      scale: see `sample_crop`.
    """
    numbers = uniform(seed, epoch, record, 40 + 2 * num_ops)
    return sample_crop(numbers[:40], size, scale), sample_ops(numbers[40:], out_size, num_ops, magnitude)


def sample_crop(
    numbers: np.ndarray,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Samples a crop by the rule of torchvision's RandomResizedCrop.

    Ten candidates are drawn, each with a fraction of the area (uniform in `scale`) and an aspect (log-uniform in
    `ratio`). The first that fits is placed anywhere in the image. If none fits, the crop is the centre of the image, as
    large as `ratio` allows.

    Args:
      numbers: random numbers, float64 [40] in [0, 1).
      size: (height, width) of the image, pixels.
      scale: lowest and highest fraction of the image's area.
      ratio: lowest and highest width / height.
    """
    height, width = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape, y, x in numbers[:40].reshape(10, 4).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return Crop(int((height - rows + 1) * y), int((width - columns + 1) * x), rows, columns)
    rows, columns = height, width
    if width / height < ratio[0]:
        rows = round(width / ratio[0])
    elif width / height > ratio[1]:
        columns = round(height * ratio[1])
    return Crop((height - rows) // 2, (width - columns) // 2, rows, columns)


def sample_ops(numbers: np.ndarray, size: tuple[int, int], num_ops: int = 2, magnitude: int = 9) -> tuple[Op, ...]:
    """Samples operations by the rule of torchvision's RandAugment with 31 magnitudes: 0, the weakest, to 30.

    Args:
      numbers: random numbers, float64 [2 * num_ops] in [0, 1).
      size: (height, width) of the resized crop, to which the operations are applied, pixels.
      num_ops: number of operations, applied one after another.
      magnitude: magnitude of every operation, 0 to 30.

    Raises:
      ValueError: the magnitude is out of range.
    """
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"the magnitude of RandAugment must be 0 to {MAX_MAGNITUDE}, not {magnitude}")
    strength = magnitude / MAX_MAGNITUDE
    ops = []
    for which, sign in numbers[: 2 * num_ops].reshape(num_ops, 2).tolist():
        name, value = OPS[int(which * len(OPS))], 0.0
        if name in _SIGNED:
            length = {"TranslateX": size[1], "TranslateY": size[0]}.get(name, 1)
            value = _SIGNED[name] * length * strength * (1 if sign < 0.5 else -1)
        elif name == "Posterize":
            value = 8.0 - round(4 * strength)  # bits kept per channel
        elif name == "Solarize":
            value = 255 * (1 - strength)  # brightness from which values are inverted
        ops.append((name, value))
    return tuple(ops)


def read_params(entry: Any) -> tuple[Crop | None, tuple[Op, ...]]:
    """Reads one entry of `param_aug` in DataCompDR's paug.json: [[top, left, height, width], [[op, magnitude], ...]].

    Either part may be null, which means that it was not applied: the crop is then None, the operations ().

    Raises:
      ValueError: the entry has another shape, an unknown operation, or a number that sampling never gives.
    """
    try:
        crop, ops = entry
        if ops and len(ops) > MAX_OPS:
            raise ValueError("too many operations")
        crop = None if crop is None else Crop(*crop)
        ops = tuple((OPS[number] if number >= 0 else "", float(value)) for number, value in ops or ())
        whole = crop is None or all(type(side) is int for side in crop)
        if not whole or not all(name and abs(value) <= 10_000 for name, value in ops):
            raise ValueError("a number is out of range")
        if not all(1 <= value <= 8 for name, value in ops if name == "Posterize"):
            raise ValueError("Posterize keeps 1 to 8 bits")
        return crop, ops
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        shown = repr(entry)[:80]
        raise ValueError(f"param_aug must be [[top, left, height, width], [[op, magnitude], ...]]: {shown}") from error


def at_side(ops: Sequence[Op], side: int, drawn_for: int = 224) -> tuple[Op, ...]:
    """Returns operations as they change a smaller view: translations, in pixels of `drawn_for`, become those of `side`.

    On a larger view they stay as they are, as in MobileCLIP's training at 256 px with operations drawn for 224.
    """
    factor = min(side / drawn_for, 1.0)
    return tuple((name, value * factor if name.startswith("Translate") else value) for name, value in ops)


def scale_crop(crop: Crop, size: tuple[int, int], new_size: tuple[int, int]) -> Crop:
    """Returns the part of a resized image that shows what `crop` does of the image: the nearest whole pixels.

    Args:
      crop: part of the image.
      size: (height, width) of the image, pixels.
      new_size: (height, width) of the resized image, pixels.

    Raises:
      ValueError: the crop is not inside the image.
    """
    check_crop(crop, size)

    def scaled(start: int, length: int, old: int, new: int) -> tuple[int, int]:
        # A half is rounded up on both sides, so that a part that ends where another begins still does.
        first, last = ((2 * side * new + old) // (2 * old) for side in (start, start + length))
        first = min(first, new - 1)
        return first, max(1, last - first)

    top, height = scaled(crop.top, crop.height, size[0], new_size[0])
    left, width = scaled(crop.left, crop.width, size[1], new_size[1])
    return Crop(top, left, height, width)


def check_crop(crop: Crop, size: tuple[int, int]) -> None:
    """Raises ValueError if `crop` is not inside an image of `size` = (height, width) pixels."""
    height, width = size
    if not (0 <= crop.top < crop.top + crop.height <= height and 0 <= crop.left < crop.left + crop.width <= width):
        raise ValueError(f"{crop} is not inside the image of {width} x {height}: was it resized since?")


def augment_into(
    image: np.ndarray, out: np.ndarray, crop: Crop | None, ops: Sequence[Op] = (), exact: bool = False
) -> None:
    """Crops an image, resizes the crop into `out` and applies operations to it.

    Args:
      image: uint8 [h, w, 3], of the size for which `crop` was sampled.
      out: uint8 [H, W, 3], overwritten.
      crop: part of the image to use; None for the whole image.
      ops: operations, applied in this order; areas without a source pixel become black.
      exact: whether to give the pixels of torchvision's and ml-mobileclip's transforms (Pillow's bicubic) instead of
        those of `fit_into`'s fast path.

    Raises:
      ValueError: the crop is not inside the image.
    """
    size = image.shape[:2]
    top, left, rows, columns = crop = crop or Crop(0, 0, *size)
    check_crop(crop, size)
    fit_into(image[top : top + rows, left : left + columns], out, "stretch", exact=exact)
    changed = out
    for name, magnitude in ops:
        changed = apply(changed, name, magnitude)
    if changed is not out:
        out[:] = changed
