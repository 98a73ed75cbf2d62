"""Prepares images and captions for the two towers of stage 0, by the settings in a folder."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fastvlm_jax.images.inputs import Image, to_pixels
from fastvlm_jax.images.resize import fit_into
from fastvlm_jax.images.settings import (
    OWN,
    SETTINGS,
    ImageSettings,
    check_choices,
    colour_of,
    image_settings,
    read_image_files,
    read_image_settings,
)
from fastvlm_jax.text.caption_tokenizer import CaptionTokenizer, load_caption_tokenizer


@dataclasses.dataclass(frozen=True)
class PairProcessor:
    """Holds what turns images and captions into what the two towers read.

    Attributes:
      tokenizer: see text/caption_tokenizer.py.
      context_length: number of tokens of a text, padding included.
      image_size: side of the square that the image tower sees, pixels.
      image_mean: mean with which the image tower normalises RGB in [0, 1]; also the colour around padded images.
      image_std: standard deviation with which it normalises RGB in [0, 1].
      fit: how a whole image is fitted into the square, "pad", "crop" or "stretch"; see `fit_into`.
      transparency: what is behind transparent pixels, "white" or "drop"; see `images.modes.to_rgb`.
      teachers: widths of the features of the teachers that are distilled, in the order in which records store them.
    """

    tokenizer: CaptionTokenizer
    context_length: int
    image_size: int
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    fit: str = "crop"
    transparency: str = "white"
    teachers: tuple[int, ...] = ()

    def __post_init__(self):
        check_choices(self.fit, self.transparency)
        if self.context_length < 2:
            raise ValueError(f"model.text.context_length={self.context_length} must hold a start and an end: 2 or more")

    @property
    def background(self) -> tuple[int, int, int]:
        """Returns the RGB colour around images, 0 to 255."""
        return colour_of(self.image_mean)

    def images(self, images: Sequence[Image]) -> np.ndarray:
        """Returns images as the image tower reads them, uint8 [1, N, image_size, image_size, 3].

        Args:
          images: files, bytes, Pillow images or arrays, see `images.inputs.to_pixels`.

        Raises:
          MissingImage: there is no such file; a FileNotFoundError and a ValueError.
          ValueError: a file, which the message names, or an array is not an image.
        """
        views = np.empty((1, len(images), self.image_size, self.image_size, 3), np.uint8)
        for number, image in enumerate(images):
            views[0, number] = self.view(image, f"images[{number}]")
        return views

    def view(self, image: Image, name: str = "the image") -> np.ndarray:
        """Returns one image as the image tower reads it, uint8 [image_size, image_size, 3]; see `images` for errors."""
        view = np.empty((self.image_size, self.image_size, 3), np.uint8)
        fit_into(to_pixels(image, name, self.transparency), view, self.fit, self.background, True)
        return view

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns texts as the text tower reads them, int32 [N, context_length]."""
        return self.tokenizer(texts, self.context_length)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's files and preprocessor_config.json, which transformers' image processors read too."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        written = image_settings(ImageSettings(self.image_size, self.image_mean, self.image_std, self.fit))
        del written["processor_class"]  # which would join the image settings and a language model's tokenizer
        if self.fit != "pad":
            written["image_processor_type"] = "CLIPImageProcessor"
        written[OWN] = {
            "context_length": self.context_length,
            "transparency": self.transparency,
            "teachers": self.teachers,
        }
        (folder / SETTINGS).write_text(json.dumps(written, indent=2) + "\n")


def holds_pair_processor(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds what `PairProcessor.save` writes."""
    return (folder / SETTINGS).is_file() and "context_length" in read_image_files(folder).own


def load_pair_processor(folder: str | os.PathLike) -> PairProcessor:
    """Loads a processor from a folder that `PairProcessor.save` wrote.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: a file is damaged or of something else; the message names it.
    """
    folder = pathlib.Path(folder).expanduser()
    tokenizer = load_caption_tokenizer(folder)
    files = read_image_files(folder)
    if "context_length" not in files.own:
        raise ValueError(f"{files.path} has no context_length of a text tower: it is not of a run of stage 0")
    try:
        images, own = read_image_settings(files.settings), files.own
        return PairProcessor(
            tokenizer,
            int(own["context_length"]),
            images.size,
            images.mean,
            images.std,
            images.fit,
            own["transparency"],
            tuple(int(width) for width in own["teachers"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{files.path}: the image settings cannot be read: {reason}") from error
