"""Prepares images and texts for a model, by the tokenizer, template and image settings in the model's directory."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from fastvlm_jax.batch import Batch
from fastvlm_jax.files import read_small
from fastvlm_jax.images import decode as image_lib
from fastvlm_jax.images.inputs import Image, share_images, to_pixels
from fastvlm_jax.images.resize import fit_into, tiles_into
from fastvlm_jax.images.settings import (
    ImageSettings,
    check_choices,
    colour_of,
    image_files,
    read_image_files,
    read_image_settings,
)
from fastvlm_jax.images.sizes import Grid, Size, best_grid, check_room, nearest, slots_of
from fastvlm_jax.text.conversation import TEMPLATES, Segment, Turn, chat_template, end_mark, render, template_of
from fastvlm_jax.text.generation_config import FILE as GENERATION
from fastvlm_jax.text.generation_config import GenerationConfig, read_generation_config
from fastvlm_jax.text.prompt import place_images, read_prompts
from fastvlm_jax.text.tokenizer import PAD, Tokenizer, load_tokenizer

CHAT_TEMPLATE = "chat_template.jinja"


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
      fit: how an image without tiles is fitted into its size, "pad", "crop" or "stretch"; see `fit_into`.
      grids: (rows, columns) of the AnyRes tiles to choose from; empty without AnyRes.
      sizes: sizes of all resolutions and aspect buckets; empty if there is only the square of `image_size`.
      transparency: what is behind transparent pixels, "white" or "drop"; see `images.modes.to_rgb`.
      generation: settings of the model's generation_config.json; None if it has none.
      published: contents, by file name, of the settings that a folder of transformers gave; an export holds them
        unchanged while they describe this processor.
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
    generation: GenerationConfig | None = dataclasses.field(default=None, hash=False)
    published: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown data.template {self.template!r}: choose one of {', '.join(TEMPLATES)}")
        check_choices(self.fit, self.transparency)
        if not all(len(grid) == 2 and min(grid) >= 1 for grid in self.grids):
            raise ValueError(f"data.grids: {self.grids} must be pairs of rows and columns, such as ((2, 2),)")
        check_room((self.size, *self.sizes), self.grids)
        if self.grids and any(size.height != size.width for size in self.sizes):
            raise ValueError("data.grids and data.aspects exclude each other: tiles are square")

    @property
    def end_id(self) -> int:
        """Returns the id of the template's mark that ends an answer, which the model is trained to write."""
        return self.tokenizer.special_id(end_mark(TEMPLATES[self.template], self.tokenizer))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Returns all ids that end an answer: `end_id`, then those of the generation_config.json.

        A model without that file also ends at `<|endoftext|>`, as Qwen2 does.
        """
        stored = self.generation.end_ids if self.generation is not None else ()
        if not stored and self.tokenizer.pad == PAD:
            stored = (self.tokenizer.special_id(PAD),)
        return tuple(dict.fromkeys((self.end_id, *stored)))

    @property
    def sampling(self) -> dict[str, float]:
        """Returns the sampling of the generation_config.json, arguments of `generate.generate`; greedy if none."""
        return (self.generation or GenerationConfig({})).sampling

    @property
    def size(self) -> Size:
        """Returns the square of `image_size`."""
        return Size(self.image_size, self.image_size, self.image_size, self.tokens_per_image)

    @property
    def background(self) -> tuple[int, int, int]:
        """Returns the RGB colour around images, 0 to 255."""
        return colour_of(self.image_mean)

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

    def save(self, folder: str | os.PathLike, *, export: bool = False, padded_before: bool = False) -> None:
        """Writes the tokenizer's files, chat_template.jinja, and the settings of transformers for answers and images.

        Args:
          folder: folder to write into.
          export: whether the folder is for PyTorch: settings that were read from such a folder are written unchanged.
          padded_before: whether the folder's reader pads images before it applies the settings, as ml-fastvlm does.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        (folder / CHAT_TEMPLATE).write_text(chat_template(TEMPLATES[self.template], self.tokenizer))
        contents: dict[str, Any] = {}
        if self.generation is not None:
            contents[GENERATION] = self.generation.with_ends(self.end_ids).settings
        if self.image_size:
            own = {
                "template": self.template,
                "tokens_per_image": self.tokens_per_image,
                "grids": self.grids,
                "sizes": self.sizes,
                "transparency": self.transparency,
            }
            settings = ImageSettings(self.image_size, self.image_mean, self.image_std, self.fit)
            contents |= image_files(settings, own, self.published, export, padded_before)
        for name, value in contents.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def load_processor(
    folder: str | os.PathLike,
    tokens_per_image: Callable[[int], int] | None = None,
    template: str | None = None,
    image_size: int | None = None,
    fit: str | None = None,
    grids: tuple[Grid, ...] = (),
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
      fit, grids: see Processor, for a model whose config.json gives them; by default the image settings decide.

    A warning names the settings that would change ids, pixels or answers and that this package does not compute.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: a file is damaged, or neither the folder nor the caller gives the number of tokens of an image.
    """
    folder = pathlib.Path(folder).expanduser()
    tokenizer = load_tokenizer(folder)
    generation = read_generation_config(folder)
    files = read_image_files(folder)
    own, joined = files.own, files.joined
    chat = folder / CHAT_TEMPLATE
    # Compared with the templates of this package, and never run: a template is a program in Jinja.
    written = read_small(chat).decode(errors="replace") if chat.is_file() else ""
    try:
        images = read_image_settings(files.settings)
        size = images.size or image_size or 0
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
        grids = tuple((int(rows), int(columns)) for rows, columns in own.get("grids", grids))
        if any(min(item) < 1 or max(item[:3]) > image_lib.MAX_SIDE for item in sizes):
            raise ValueError(f"sizes {sizes} must be positive, up to {image_lib.MAX_SIDE} a side")
        fit, transparency = own.get("fit", fit or images.fit), own.get("transparency", "white")
        processor = Processor(
            tokenizer, found, size, count, images.mean, images.std, fit, grids, sizes, transparency, generation,
            files.published,
        )  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{files.path}: the image settings cannot be read: {reason}") from error
    # An image that was padded to a square, as config.json may ask for, has no part that a centre crop could cut off.
    ignored = [item for item in images.unused if fit != "pad" or not item.startswith(("do_center_crop", "size"))]
    if size and ignored:
        logging.warning("%s: not computed here, so pixels may differ: %s", files.path, ", ".join(ignored))
    return processor


@functools.lru_cache(maxsize=4096)
def _segment(tokenizer, template, tokens_per_image, turns, generation_prompt, slots) -> Segment:
    segment = render(turns, tokenizer, TEMPLATES[template], tokens_per_image, generation_prompt, slots)
    for array in (segment.tokens, segment.image_index, segment.loss_mask):
        array.flags.writeable = False
    return segment
