"""The processor of a model: its tokenizer, conversation template and image settings, kept in the model's directory."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.data import image as image_lib
from fastvlm_jax.data.conversation import TEMPLATES, Segment, Template, Turn, render
from fastvlm_jax.data.tokenizer import END, IMAGE, START, Tokenizer, load_tokenizer

SETTINGS = "preprocessor_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

Image = str | os.PathLike | bytes | np.ndarray


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns images and texts into a Batch.

    Attributes:
      tokenizer: see tokenizer.py.
      template: a name in conversation.TEMPLATES.
      image_size: side of the square the model sees, pixels.
      tokens_per_image: feature vectors that the model makes of one image.
    """

    tokenizer: Tokenizer
    template: str
    image_size: int
    tokens_per_image: int

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown data.template {self.template!r}: choose one of {', '.join(TEMPLATES)}")

    def segment(self, turns: tuple[Turn, ...], generation_prompt: bool = False) -> Segment:
        """Returns the tokens of one conversation; recent ones are remembered, so the arrays are read-only."""
        return _segment(self, turns, generation_prompt)

    def pixels(self, image: Image) -> np.ndarray:
        """Returns a file, encoded bytes or uint8 [H, W, 3] as uint8 [image_size, image_size, 3].

        Raises:
          FileNotFoundError: no such file.
          ValueError: not an image; the message names the file.
        """
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
        return image_lib.pad_to_square(image, self.image_size)

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
        """Writes the tokenizer's file, chat_template.jinja and preprocessor_config.json into `folder`."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        (folder / CHAT_TEMPLATE).write_text(chat_template(TEMPLATES[self.template]))
        side = {"height": self.image_size, "width": self.image_size}
        settings = {
            "image_processor_type": "LlavaImageProcessor",  # CLIPImageProcessor and `do_pad`: pads to a square
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
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "fastvlm_jax": {"template": self.template, "tokens_per_image": self.tokens_per_image},
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load_processor(folder: str | os.PathLike) -> Processor:
    """Reads what `Processor.save` wrote.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the settings are not ours.
    """
    path = pathlib.Path(folder).expanduser() / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"no processor in {folder}: {SETTINGS} is missing")
    try:
        settings = json.loads(path.read_text())
        size, own = settings["crop_size"]["height"], settings["fastvlm_jax"]
        template, tokens_per_image = own["template"], own["tokens_per_image"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a processor of fastvlm_jax: {type(error).__name__} {error}") from error
    return Processor(load_tokenizer(folder), template, size, tokens_per_image)


def chat_template(template: Template) -> str:
    """Returns `template` in the jinja text that transformers' `apply_chat_template` reads."""
    image, end = json.dumps(IMAGE + template.after_image), json.dumps(END + template.after_end)
    system = json.dumps(f"{START}system\n{template.system}{END}{template.after_end}")
    lines = ["{%- if messages[0]['role'] != 'system' %}{{ " + system + " }}{% endif %}"] * (template.system is not None)
    lines += ["{%- for message in messages %}"]
    if template.turn_marks:
        lines += ["{{- " + json.dumps(START) + " + message['role'] + " + json.dumps("\n") + " }}"]
    shown = "{%- if true %}" if template.turn_marks else "{%- if message['role'] == 'assistant' %}"
    lines += [
        "{%- if message['content'] is string %}" + shown + "{{ message['content'] }}{% endif %}",
        "{%- else %}{%- for part in message['content'] %}",
        "{%- if part['type'] == 'image' %}{{ " + image + " }}",
        "{%- else %}" + shown + "{{ part['text'] }}{% endif %}{%- endif %}",
        "{%- endfor %}{%- endif %}",
        shown + "{{ " + end + " }}{% endif %}",
        "{%- endfor %}",
    ]
    if template.turn_marks:
        lines += ["{%- if add_generation_prompt %}{{ " + json.dumps(f"{START}assistant\n") + " }}{% endif %}"]
    return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def _segment(processor: Processor, turns: tuple[Turn, ...], generation_prompt: bool) -> Segment:
    template = TEMPLATES[processor.template]
    segment = render(turns, processor.tokenizer, template, processor.tokens_per_image, generation_prompt)
    for array in (segment.tokens, segment.image_index, segment.loss_mask):
        array.flags.writeable = False
    return segment
