"""Prepares images and texts for a model, by the tokenizer, template and image settings in the model's directory."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.images import decode as image_lib
from fastvlm_jax.images.inputs import Image, share_images, to_pixels
from fastvlm_jax.images.modes import TRANSPARENCIES
from fastvlm_jax.images.resize import fit_into, tiles_into
from fastvlm_jax.images.sizes import Grid, Size, best_grid, nearest, slots_of
from fastvlm_jax.text.bpe import read_settings
from fastvlm_jax.text.conversation import TEMPLATES, Segment, Turn, chat_template, end_mark, render, template_of
from fastvlm_jax.text.prompt import place_images, read_prompts
from fastvlm_jax.text.tokenizer import Tokenizer, load_tokenizer

SETTINGS = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # settings of transformers' processor, which joins tokenizer and image settings
CHAT_TEMPLATE = "chat_template.jinja"
OWN = "fastvlm_jax"  # key of the settings that transformers does not have
FITS = ("pad", "crop")


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns images and texts into a Batch.

    Attributes:
      tokenizer: see text/tokenizer.py.
      template: name in conversation.TEMPLATES.
      image_size: side of the square that the model sees, pixels; 0 for a text-only model.
      tokens_per_image: number of feature vectors that the model makes of one such square.
      image_mean: mean with which the encoder normalises RGB in [0, 1]. It is also the colour around images that are
        not square, as in LLaVA: black for FastVLM.
      image_std: standard deviation with which the encoder normalises RGB in [0, 1].
      fit: how an image without tiles is fitted into its size, "pad" or "crop"; see `fit_into`.
      grids: (rows, columns) of the AnyRes tiles to choose from; empty without AnyRes.
      sizes: sizes of all resolutions and aspect buckets; empty if there is only the square of `image_size`.
      transparency: what is behind transparent pixels, "white" or "drop"; see `images.modes.to_rgb`.
    """

    tokenizer: Tokenizer
    template: str
    image_size: int
    tokens_per_image: int
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    fit: str = "pad"
    grids: tuple[Grid, ...] = ()
    sizes: tuple[Size, ...] = ()
    transparency: str = "white"

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown data.template {self.template!r}: choose one of {', '.join(TEMPLATES)}")
        if self.fit not in FITS:
            raise ValueError(f"unknown data.fit {self.fit!r}: choose one of {', '.join(FITS)}")
        if self.transparency not in TRANSPARENCIES:
            options = ", ".join(TRANSPARENCIES)
            raise ValueError(f"unknown data.transparency {self.transparency!r}: choose one of {options}")
        if not all(len(grid) == 2 and min(grid) >= 1 for grid in self.grids):
            raise ValueError(f"data.grids: {self.grids} must be pairs of rows and columns, such as ((2, 2),)")
        if self.grids and any(size.height != size.width for size in self.sizes):
            raise ValueError("data.grids and data.aspects exclude each other: tiles are square")

    @property
    def end_id(self) -> int:
        """Returns the id that ends an answer."""
        return self.tokenizer.special_id(end_mark(TEMPLATES[self.template], self.tokenizer))

    @property
    def size(self) -> Size:
        """Returns the square of `image_size`."""
        return Size(self.image_size, self.image_size, self.image_size, self.tokens_per_image)

    @property
    def background(self) -> tuple[int, int, int]:
        """Returns the RGB colour around images, 0 to 255."""
        return tuple(int(mean * 255) for mean in self.image_mean)

    def segment(
        self,
        turns: tuple[Turn, ...],
        generation_prompt: bool = False,
        slots: tuple[int, ...] = (),
        tokens_per_image: int | None = None,
    ) -> Segment:
        """Returns the tokens of one conversation; recent ones are cached, so the arrays are read-only.

        Args:
          turns: conversation to tokenize.
          generation_prompt: whether to end where the assistant's answer would begin.
          slots: number of image slots of each image of the record; one each by default.
          tokens_per_image: number of tokens in an image slot; by default the square's of `image_size`.
        """
        tokens = self.tokens_per_image if tokens_per_image is None else tokens_per_image
        return _segment(self.tokenizer, self.template, tokens, turns, generation_prompt, slots)

    def grid(self, width: int, height: int, side: int | None = None) -> Grid:
        """Returns the (rows, columns) of tiles of `side` pixels for an image of that size; (0, 0) without AnyRes."""
        if not self.grids:
            return (0, 0)
        return self.grids[int(best_grid(width, height, self.grids, side or self.image_size))]

    def pixels(self, image: Image) -> np.ndarray:
        """Returns an image as uint8 [image_size, image_size, 3], with the pixels of transformers' CLIPImageProcessor.

        Args:
          image: file, bytes, Pillow image or array, see `to_pixels`.

        Raises:
          MissingImage: there is no such file; a FileNotFoundError and a ValueError.
          ValueError: the file, which the message names, or array is not an image; or the model is text-only.
        """
        return self.views(self.decode(image), self.size, (0, 0))[0]

    def views(self, image: np.ndarray, size: Size, grid: Grid) -> np.ndarray:
        """Returns the views of a uint8 [h, w, 3] image that the model sees: uint8 [slots, H, W, 3], overview first."""
        out = np.empty((slots_of(grid), size.height, size.width, 3), np.uint8)
        fit_into(image, out[0], self.overview(grid), self.background, True)
        if len(out) > 1:
            tiles_into(image, out[1:], grid, True)
        return out

    def overview(self, grid: Grid) -> str:
        """Returns how an image is fitted into its first slot; with tiles the overview is stretched, as in LLaVA."""
        return self.fit if slots_of(grid) == 1 else "stretch"

    def decode(self, image: Image, name: str = "the image") -> np.ndarray:
        """Decodes an image to uint8 [H, W, 3]; see `pixels` for the errors, which call the image `name`."""
        if not self.image_size:
            raise ValueError("this model is text-only but was given an image: leave the image out")
        return to_pixels(image, name, self.transparency)

    def __call__(
        self,
        images: Any,
        texts: Any,
        image_of: Any = None,
        *,
        length: int | None = None,
        max_length: int | None = None,
    ) -> Batch:
        """Makes a batch to generate from: one group with a row per prompt, which ends where its answer begins.

        Args:
          images: N images, or a single one; a list with the images of each prompt; None or [] for text alone. See
            images/inputs.py.
          texts: R prompts, or a single one: a text or a conversation, see `read_prompts`. Its `<image>` marks say where
            the images stand; without marks they stand first.
          image_of: number of the image, or numbers of the images, of each prompt. By default one prompt is about all
            images, one image is for all prompts, and otherwise image i is for prompt i.
          length: number of tokens per row, T; the default is the longest prompt, rounded up to a multiple of 16.
          max_length: largest number of tokens that the model can read; no limit by default.

        Returns:
          A Batch of numpy arrays with G = 1: images [1, slots of N images, H, W, 3], tokens [1, R, T] padded on the
          right. All images have one size: with aspect buckets, the one nearest to their mean aspect.

        Raises:
          MissingImage: there is no such image file; a FileNotFoundError and a ValueError.
          ValueError: images and prompts do not match, have another form or cannot be read, or a prompt is too long; the
            message is one line.
        """
        prompts = read_prompts(texts)
        given, image_of = share_images(images, image_of, [prompt.images for prompt in prompts])
        decoded = [self.decode(image, name) for name, image in given]
        size, grids = self.layout([(image.shape[1], image.shape[0]) for image in decoded])
        slots = tuple(map(slots_of, grids))
        chat = TEMPLATES[self.template].user_text
        talks = [place_images(prompt, numbers, chat) for prompt, numbers in zip(prompts, image_of, strict=True)]
        segments = [self.segment(turns, True, slots, size.tokens) for turns in talks]
        length = self._row_length(segments, length, max_length)
        shape = (1, len(segments), length)
        views = [self.views(image, size, grid) for image, grid in zip(decoded, grids, strict=True)]
        pixels = np.concatenate([np.zeros((0, size.height, size.width, 3), np.uint8), *views])[None]
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions, image_index = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for row, segment in enumerate(segments):
            span = np.s_[0, row, : len(segment.tokens)]
            tokens[span], image_index[span], segment_ids[span] = segment.tokens, segment.image_index, 1
            positions[span] = np.arange(len(segment.tokens))
        return Batch(
            images=pixels,
            image_mask=np.ones(pixels.shape[:2], bool),
            tokens=tokens,
            image_index=image_index,
            targets=np.zeros(shape, np.int32),
            loss_mask=np.zeros(shape, bool),
            segment_ids=segment_ids,
            positions=positions,
        )

    def _row_length(self, segments: Sequence[Segment], length: int | None, max_length: int | None) -> int:
        """Returns the number of tokens of a row; see `__call__`."""
        for name, value in (("length", length), ("max_length", max_length)):
            if value is not None and (type(value) is bool or not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name} must be a positive whole number of tokens or None, not {value!r:.40}")
        longest = max((len(segment.tokens) for segment in segments), default=0)
        length = -(-longest // 16) * 16 if length is None else int(length)
        limit = length if max_length is None else min(length, max_length)
        if longest > limit:
            raise ValueError(f"the prompt is {longest} tokens long, more than the {limit} allowed: shorten it")
        return length

    def layout(self, images: Sequence[tuple[int, int]]) -> tuple[Size, list[Grid]]:
        """Returns the common size of images of these (width, height) in a batch, and the grid of tiles of each."""
        sizes = [size for size in self.sizes if size.side == self.image_size] or [self.size]
        best = 0
        if images and len(sizes) > 1:
            aspect = np.exp(np.mean([np.log(width / height) for width, height in images]))
            best = int(nearest(aspect, sizes))
        return sizes[best], [self.grid(width, height) for width, height in images]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's files, chat_template.jinja and, for images, transformers' processor settings."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        (folder / CHAT_TEMPLATE).write_text(chat_template(TEMPLATES[self.template], self.tokenizer))
        if not self.image_size:
            return
        side = {"height": self.image_size, "width": self.image_size}
        settings = {
            "image_processor_type": "LlavaImageProcessor",  # CLIPImageProcessor with `do_pad`, which pads to a square
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": True,
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            OWN: {
                "template": self.template,
                "tokens_per_image": self.tokens_per_image,
                "fit": self.fit,
                "grids": self.grids,
                "sizes": self.sizes,
                "transparency": self.transparency,
            },
        }
        # transformers counts (size // patch_size)^2 placeholders plus num_additional_image_tokens.
        columns = math.isqrt(self.tokens_per_image)
        patch_size = self.image_size // max(columns, 1)
        if columns**2 != self.tokens_per_image or self.image_size // max(patch_size, 1) != columns:
            columns, patch_size = 1, self.image_size
        joined = {
            "processor_class": "LlavaProcessor",
            "patch_size": patch_size,
            "num_additional_image_tokens": self.tokens_per_image - columns**2,
            "vision_feature_select_strategy": "full",
        }
        for name, value in ((SETTINGS, settings), (PROCESSOR, joined)):
            (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def load_processor(
    folder: str | os.PathLike,
    tokens_per_image: Callable[[int], int] | None = None,
    template: str | None = None,
    image_size: int | None = None,
) -> Processor:
    """Loads a processor from a folder of `Processor.save`, of transformers, or with a tokenizer alone.

    Args:
      folder: folder with the tokenizer's files and, unless the model is text-only, preprocessor_config.json or
        processor_config.json.
      tokens_per_image: function from the image size to the number of tokens of an image. Without it the folder must
        give the number.
      template: name of the template if the folder does not name one of conversation.TEMPLATES. The default is vicuna_v1
        for a tokenizer with Llama's `</s>`, else qwen_2.
      image_size: side of the images in pixels if the folder gives none. Without it the model is then text-only.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: a file is damaged, or neither the folder nor the caller gives the number of tokens of an image.
    """
    folder = pathlib.Path(folder).expanduser()
    tokenizer = load_tokenizer(folder)
    joined = read_settings(folder / PROCESSOR)
    nested = joined.get("image_processor")
    path = folder / (PROCESSOR if isinstance(nested, dict) else SETTINGS)
    settings = nested if isinstance(nested, dict) else read_settings(path)
    own = settings.get(OWN, {})
    try:
        size, mean, std = _image_settings(settings)
        size = size or image_size or 0
        chat = folder / CHAT_TEMPLATE
        written = chat.read_text(encoding="utf-8") if chat.is_file() else ""
        found = own["template"] if own else template_of(written, tokenizer)
        if not size or tokens_per_image is not None:
            count = tokens_per_image(size) if size else 0
        elif own:
            count = int(own["tokens_per_image"])
        elif "patch_size" not in joined:
            raise ValueError(f"{folder} does not say how many tokens an image has: give tokens_per_image")
        else:
            count = (size // joined["patch_size"]) ** 2 + joined.get("num_additional_image_tokens", 0)
            count -= joined.get("vision_feature_select_strategy") == "default"
        found = found or template or ("vicuna_v1" if tokenizer.end == "</s>" else "qwen_2")
        sizes = tuple(Size(*map(int, item)) for item in own.get("sizes", ()))
        grids = tuple((int(rows), int(columns)) for rows, columns in own.get("grids", ()))
        if any(min(item) < 1 or max(item[:3]) > image_lib.MAX_SIDE for item in sizes):
            raise ValueError(f"sizes {sizes} must be positive, up to {image_lib.MAX_SIDE} a side")
        fit, transparency = own.get("fit", "pad"), own.get("transparency", "white")
        return Processor(tokenizer, found, size, count, mean, std, fit, grids, sizes, transparency)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{path}: the image settings cannot be read: {reason}") from error


def _image_settings(settings: dict[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Returns the size (0 if there is none), mean and std of a CLIP-like image processor."""
    size = settings.get("crop_size") or settings.get("size") or 0
    if isinstance(size, dict):
        sides = {value for key, value in size.items() if key in ("height", "width", "shortest_edge")}
        size = sides.pop() if len(sides) == 1 else size
    mean = tuple(float(value) for value in settings.get("image_mean", [0] * 3))
    std = tuple(float(value) for value in settings.get("image_std", [1] * 3))
    if type(size) is not int or not 0 <= size <= image_lib.MAX_SIDE:
        raise ValueError(f"size {size!r} must be one side of a square, up to {image_lib.MAX_SIDE}")
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"image_mean {mean} and image_std {std} must be three numbers each, image_std positive")
    return size, mean, std


@functools.lru_cache(maxsize=4096)
def _segment(tokenizer, template, tokens_per_image, turns, generation_prompt, slots) -> Segment:
    segment = render(turns, tokenizer, TEMPLATES[template], tokens_per_image, generation_prompt, slots)
    for array in (segment.tokens, segment.image_index, segment.loss_mask):
        array.flags.writeable = False
    return segment
