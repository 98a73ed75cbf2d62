"""The processor of a model: its tokenizer, conversation template and image settings, kept in the model's directory."""

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
from fastvlm_jax.data import image as image_lib
from fastvlm_jax.data.bpe import read_settings
from fastvlm_jax.data.conversation import TEMPLATES, Segment, Turn, chat_template, end_mark, render
from fastvlm_jax.data.tokenizer import Tokenizer, load_tokenizer

SETTINGS = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of transformers' processor, which joins tokenizer and image settings
CHAT_TEMPLATE = "chat_template.jinja"
OWN = "fastvlm_jax"  # the key of what transformers has no word for

Image = str | os.PathLike | bytes | np.ndarray


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns images and texts into a Batch.

    Attributes:
      tokenizer: see tokenizer.py.
      template: a name in conversation.TEMPLATES.
      image_size: side of the square the model sees, pixels; 0 for a model of text alone.
      tokens_per_image: feature vectors that the model makes of one image.
      image_mean, image_std: what the encoder normalises with. Here the mean is the colour around images that are not
        square, as in LLaVA: black for FastVLM.
    """

    tokenizer: Tokenizer
    template: str
    image_size: int
    tokens_per_image: int
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown data.template {self.template!r}: choose one of {', '.join(TEMPLATES)}")

    @property
    def end_id(self) -> int:
        """The id that ends an answer."""
        return self.tokenizer.special_id(end_mark(TEMPLATES[self.template], self.tokenizer))

    def segment(self, turns: tuple[Turn, ...], generation_prompt: bool = False) -> Segment:
        """Returns the tokens of one conversation; recent ones are remembered, so the arrays are read-only."""
        return _segment(self, turns, generation_prompt)

    def pixels(self, image: Image) -> np.ndarray:
        """Returns a file, encoded bytes or uint8 [H, W, 3] as uint8 [image_size, image_size, 3].

        Raises:
          FileNotFoundError: no such file.
          ValueError: not an image; the message names the file. Or the model reads no images.
        """
        if not self.image_size:
            raise ValueError("this model reads text alone: it was given an image")
        where = ""
        if isinstance(image, (str, os.PathLike)):
            where, path = f"{image}: ", pathlib.Path(image).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"there is no image {image}")
            image = path.read_bytes()
        if isinstance(image, (bytes, bytearray)):
            try:
                image = image_lib.decode(bytes(image))
            except ValueError as error:
                raise ValueError(f"{where}{error}") from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"an image array must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        background = tuple(int(mean * 255) for mean in self.image_mean)
        return image_lib.pad_to_square(image, self.image_size, background)

    def __call__(
        self,
        images: Sequence[Image] | Image,
        texts: Sequence[str] | str,
        image_of: Sequence[int] | None = None,
        *,
        length: int | None = None,
        max_length: int | None = None,
    ) -> Batch:
        """Makes the batch to generate from: one group, a row for each text, ending where its answer begins.

        Args:
          images: N images, or a single one; none for text alone.
          texts: R questions, or a single one.
          image_of: the image that each text reads. The default is image i for text i, or the one image for all.
          length: T; the default is the longest text, rounded up to a multiple of 16.
          max_length: the most tokens that the model can read.

        Returns:
          A Batch of numpy arrays with G = 1: images [1, N, H, W, 3], tokens [1, R, T] padded on the right.

        Raises:
          ValueError: images and texts that do not match, an unreadable image, or a text too long.
        """
        texts = [texts] if isinstance(texts, str) else texts
        images = [images] if isinstance(images, Image) else images
        if image_of is None:
            if len(images) > 1 and len(images) != len(texts):
                raise ValueError(f"{len(images)} images for {len(texts)} texts: say which each reads with image_of")
            image_of = range(len(texts)) if len(images) > 1 else [0] * len(texts)
        elif len(image_of) != len(texts) or not all(0 <= i < len(images) for i in image_of):
            raise ValueError(f"image_of must give each of {len(texts)} texts one of {len(images)} images: {image_of}")
        turns = [(("user", (i, text) if len(images) else (text,)),) for text, i in zip(texts, image_of, strict=True)]
        segments = [self.segment(turn, generation_prompt=True) for turn in turns]
        longest = max((len(segment.tokens) for segment in segments), default=0)
        length = -(-longest // 16) * 16 if length is None else length
        if longest > min(length, max_length or longest):
            limit = min(length, max_length or length)
            raise ValueError(f"the prompt is {longest} tokens long, more than the {limit} allowed: shorten it")
        shape = (1, len(texts), length)
        pixels = np.zeros((1, len(images), self.image_size, self.image_size, 3), np.uint8)
        for slot, image in enumerate(images):
            pixels[0, slot] = self.pixels(image)
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions, image_index = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for row, segment in enumerate(segments):
            span = np.s_[0, row, : len(segment.tokens)]
            tokens[span], image_index[span], segment_ids[span] = segment.tokens, segment.image_index, 1
            positions[span] = np.arange(len(segment.tokens))
        return Batch(
            images=pixels,
            image_mask=np.ones((1, len(images)), bool),
            tokens=tokens,
            image_index=image_index,
            targets=np.zeros(shape, np.int32),
            loss_mask=np.zeros(shape, bool),
            segment_ids=segment_ids,
            positions=positions,
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's files, chat_template.jinja and, for images, what transformers' processor reads."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        (folder / CHAT_TEMPLATE).write_text(chat_template(TEMPLATES[self.template], self.tokenizer))
        if not self.image_size:
            return
        side = {"height": self.image_size, "width": self.image_size}
        settings = {
            "image_processor_type": "LlavaImageProcessor",  # CLIPImageProcessor and `do_pad`: pads to a square
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
            OWN: {"template": self.template, "tokens_per_image": self.tokens_per_image},
        }
        # transformers counts (size // patch_size)^2 placeholders and the additional ones.
        across = math.isqrt(self.tokens_per_image)
        patch_size = self.image_size // max(across, 1)
        if across**2 != self.tokens_per_image or self.image_size // max(patch_size, 1) != across:
            across, patch_size = 1, self.image_size
        joined = {
            "processor_class": "LlavaProcessor",
            "patch_size": patch_size,
            "num_additional_image_tokens": self.tokens_per_image - across**2,
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
    """Reads what `Processor.save` wrote, a transformers folder, or a folder with a tokenizer alone.

    Args:
      folder: with the tokenizer's files and, unless the model reads text alone, preprocessor_config.json or
        processor_config.json.
      tokens_per_image: image size to the number of its tokens. Without it the folder has to say.
      template: the one to use where the folder does not name one of conversation.TEMPLATES. Without it that is
        vicuna_v1 for a tokenizer with Llama's `</s>`, else qwen_2.
      image_size: the one to use where the folder gives none; without it the model reads text alone.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: a file is damaged, or does not say how many tokens an image has and neither does the caller.
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
        found = own["template"] if own else _template(folder / CHAT_TEMPLATE, tokenizer)
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
        return Processor(tokenizer, found, size, count, mean, std)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{path}: the image settings cannot be read: {reason}") from error


def _image_settings(settings: dict[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """The size (0 if there is none), mean and std of a CLIP-like image processor."""
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


def _template(path: pathlib.Path, tokenizer: Tokenizer) -> str | None:
    """The name of the template that a chat_template.jinja of ours holds."""
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    return next((name for name, known in TEMPLATES.items() if chat_template(known, tokenizer) == text), None)


@functools.lru_cache(maxsize=4096)
def _segment(processor: Processor, turns: tuple[Turn, ...], generation_prompt: bool) -> Segment:
    template = TEMPLATES[processor.template]
    segment = render(turns, processor.tokenizer, template, processor.tokens_per_image, generation_prompt)
    for array in (segment.tokens, segment.image_index, segment.loss_mask):
        array.flags.writeable = False
    return segment
