"""Reads and writes the image settings of transformers' CLIP, LLaVA and SigLIP processors."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.files import read_object
from fastvlm_jax.images.decode import MAX_SIDE
from fastvlm_jax.images.modes import TRANSPARENCIES

SETTINGS = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # settings of transformers' processor, which joins tokenizer and image settings
NESTED = "image_processor"  # key of the image settings in processor_config.json, where transformers 5 writes them
OWN = "fastvlm_jax"  # key of the settings that transformers does not have
REPLACED = ("crop_size", "do_normalize", "image_mean", "image_std")  # keys of ours that hold in place of transformers'
BICUBIC = 3  # Pillow's number
FITS = ("pad", "crop", "stretch")  # modes of images/resize.py's fit_into


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Holds what a preprocessor_config.json asks for.

    Attributes:
      size: side of the square that the model sees, pixels; 0 if the file gives none.
      mean, std: statistics with which RGB in [0, 1] is normalised.
      fit: how an image is fitted into the square, a mode of `fit_into`.
      unused: settings, as "key=value", that would change pixels and that this package does not compute.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: str
    unused: tuple[str, ...] = ()


def check_choices(fit: str, transparency: str) -> None:
    """Raises ValueError unless `fit` and `transparency` are known; see Processor."""
    if fit not in FITS:
        raise ValueError(f"unknown data.fit {fit!r}: choose one of {', '.join(FITS)}")
    if transparency not in TRANSPARENCIES:
        raise ValueError(f"unknown data.transparency {transparency!r}: choose one of {', '.join(TRANSPARENCIES)}")


def colour_of(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Returns the RGB colour, 0 to 255, that an encoder's normalisation with this mean makes 0."""
    return tuple(int(value * 255) for value in mean)


def read_image_settings(settings: Mapping[str, Any]) -> ImageSettings:
    """Reads the image settings in a parsed JSON object; FastVLM's own fill what it omits.

    Raises:
      ValueError: the image is not a square, or a value is not of its kind.
      TypeError: a value is not of its kind.
    """
    size = settings.get("crop_size") or settings.get("size") or 0
    if isinstance(size, dict):
        sides = {value for key, value in size.items() if key in ("height", "width", "shortest_edge")}
        size = sides.pop() if len(sides) == 1 else size
    normalised = settings.get("do_normalize", True)
    mean = tuple(float(value) for value in settings.get("image_mean", [0] * 3)) if normalised else (0.0,) * 3
    std = tuple(float(value) for value in settings.get("image_std", [1] * 3)) if normalised else (1.0,) * 3
    if type(size) is not int or not 0 <= size <= MAX_SIDE:
        raise ValueError(f"size {size!r} must be one side of a square, up to {MAX_SIDE}")
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"image_mean {mean} and image_std {std} must be three numbers each, image_std positive")
    fit, unused = _fit(settings, size)
    return ImageSettings(size, mean, std, fit, (*unused, *_unused(settings)))


def _fit(settings: Mapping[str, Any], side: int) -> tuple[str, list[str]]:
    """Returns the mode of `fit_into`, and what it leaves out of the settings.

    A processor pads to a square (LLaVA's with do_pad), then resizes to `size`, then cuts out `crop_size`. Without any
    of the keys that decide, the mode is FastVLM's "pad".
    """
    kind, size = str(settings.get("image_processor_type") or ""), settings.get("size")
    crops = settings.get("do_center_crop")
    if settings.get("do_pad") and (not kind or kind.startswith("Llava")):
        return "pad", []
    if crops is None and not kind:
        return "pad", []
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        resized, mode = size["height"], "stretch"
    else:
        resized, mode = size.get("shortest_edge", side) if isinstance(size, dict) else size or side, "crop"
    crops = not kind.startswith("Siglip") if crops is None else crops
    if mode == "crop" and not crops:
        return mode, ["do_center_crop=False"]
    return mode, [f"size={size!r} before crop_size={side}"] if crops and resized != side else []


def _unused(settings: Mapping[str, Any]) -> list[str]:
    """Returns the settings besides the fit, as "key=value", that change pixels and are not computed."""
    factor = settings.get("rescale_factor", 1 / 255)
    computed = {
        "resample": settings.get("resample", BICUBIC) in (None, BICUBIC),
        "do_resize": settings.get("do_resize", True),
        "do_rescale": settings.get("do_rescale", True),
        "rescale_factor": isinstance(factor, float | int) and abs(factor * 255 - 1) < 1e-6,
    }
    return [f"{key}={settings[key]!r}" for key, holds in computed.items() if not holds]


def image_settings(settings: ImageSettings) -> dict[str, Any]:
    """Returns the preprocessor_config.json with which transformers gives the same pixels."""
    side = {"height": settings.size, "width": settings.size}
    return {
        "image_processor_type": "LlavaImageProcessor",  # CLIPImageProcessor with `do_pad`, which pads to a square
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": settings.fit == "pad",
        "do_resize": True,
        "size": side if settings.fit == "stretch" else {"shortest_edge": settings.size},
        "resample": BICUBIC,
        "do_center_crop": settings.fit != "stretch",
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Holds the files of a folder that describe its images.

    Attributes:
      path: the file with the image settings, for messages.
      settings: the image settings, with this package's in place of others; empty if the folder has none.
      own: what this package added; empty in a folder that it did not write.
      joined: contents of processor_config.json; empty if there is none.
      published: contents by file name if another program wrote them; see `Processor`.
    """

    path: pathlib.Path
    settings: dict[str, Any]
    own: dict[str, Any]
    joined: dict[str, Any]
    published: dict[str, dict[str, Any]]


def read_image_files(folder: pathlib.Path) -> ImageFiles:
    """Reads the image settings in a folder of transformers or of this package; raises ValueError for a damaged file."""
    files = {name: read_object(folder / name) for name in (SETTINGS, PROCESSOR) if (folder / name).is_file()}
    joined = files.get(PROCESSOR, {})
    path = PROCESSOR if isinstance(joined.get(NESTED), dict) else SETTINGS
    settings = joined[NESTED] if path == PROCESSOR else files.get(SETTINGS, {})
    own = settings.get(OWN, {})
    if not isinstance(own, dict):
        raise ValueError(f"{folder / path}: the image settings cannot be read: {OWN} is {own!r}, it must be an object")
    published = {}
    if settings and (OWN not in settings or own.get("published")):
        bare = {key: value for key, value in settings.items() if key != OWN}
        published = {**files, path: {**joined, NESTED: bare} if path == PROCESSOR else bare}
    settings = {**settings, **{key: own[key] for key in REPLACED if key in own}}
    return ImageFiles(folder / path, settings, own, joined, published)


def image_files(
    settings: ImageSettings,
    own: Mapping[str, Any],
    published: Mapping[str, Mapping[str, Any]],
    export: bool,
    padded_before: bool,
) -> dict[str, Mapping[str, Any]]:
    """Returns the contents of preprocessor_config.json and processor_config.json, by file name.

    Args:
      settings: what the files must say.
      own: what transformers does not know: tokens_per_image and all else that this package reads back.
      published, export, padded_before: see `Processor` and its `save`.
    """
    replaced = dict(zip(REPLACED, (settings.size, True, settings.mean, settings.std), strict=True))
    own = {**own, **replaced, "fit": settings.fit}
    joined = placeholders(settings.size, own["tokens_per_image"])
    path = PROCESSOR if NESTED in published.get(PROCESSOR, {}) else SETTINGS
    theirs = published.get(PROCESSOR, {}).get(NESTED) or published.get(SETTINGS)
    if export:
        whole = not own["grids"] and not own["sizes"] and own["transparency"] == "white"
        whole = whole and (not padded_before or _names_size(published.get(SETTINGS, {})))
        if theirs and whole and _describe(theirs, settings, padded_before):
            return {PROCESSOR: joined, **published}
    elif theirs:
        marked = {**theirs, OWN: {**own, "published": True}}
        return {**published, path: {**published[PROCESSOR], NESTED: marked} if path == PROCESSOR else marked}
    return {SETTINGS: {**image_settings(settings), OWN: own}, PROCESSOR: joined}


def _names_size(theirs: Mapping[str, Any]) -> bool:
    """Returns whether a preprocessor_config.json names both sizes that ml-fastvlm's app needs and mlx-vlm guesses."""
    size = theirs.get("size")
    return isinstance(size, Mapping) and "shortest_edge" in size and isinstance(theirs.get("crop_size"), Mapping)


def _describe(theirs: Mapping[str, Any], settings: ImageSettings, padded_before: bool) -> bool:
    """Returns whether published settings say what `settings` says, for a reader that may pad images before."""
    found = read_image_settings(theirs)
    fits = (settings.fit, "crop") if padded_before and settings.fit == "pad" else (settings.fit,)
    found = dataclasses.replace(found, size=found.size or settings.size, unused=())
    return any(dataclasses.replace(settings, fit=fit) == found for fit in fits)


def placeholders(size: int, tokens_per_image: int) -> dict[str, Any]:
    """Returns the processor_config.json with which transformers counts `tokens_per_image` placeholders.

    It counts (size // patch_size)^2 plus num_additional_image_tokens.
    """
    columns = math.isqrt(tokens_per_image)
    patch_size = size // max(columns, 1)
    if columns**2 != tokens_per_image or size // max(patch_size, 1) != columns:
        columns, patch_size = 1, size
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "num_additional_image_tokens": tokens_per_image - columns**2,
        "vision_feature_select_strategy": "full",
    }
