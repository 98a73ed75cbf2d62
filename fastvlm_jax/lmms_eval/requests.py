"""Reads what lmms-eval asks: the prompt with its images, as its own LLaVA model builds it, and the generation settings.

"what is it?", [image, image]     ->  ("user", (0, " ", 1, "\\nwhat is it?"))
"<image> or <image>?", [2 images] ->  ("user", (0, " or ", 1, "?"))                 marks in the text say where
"""

import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import PIL.Image
from absl import logging

from fastvlm_jax.evaluate.benchmark import Picture, Protocol, Row, ask, ask_lmms_eval
from fastvlm_jax.text.conversation import Turn
from fastvlm_jax.text.prompt import MARK

KNOWN = {
    "max_new_tokens", "temperature", "do_sample", "top_p", "top_k", "repetition_penalty", "seed", "num_beams",
}  # fmt: skip
# lmms-eval's LLaVA model reads `until` and does not apply it; a model of this package has image settings of its own.
NOT_APPLIED = {"until", "image_aspect_ratio", "use_cache"}


class Settings(NamedTuple):
    """Holds the generation settings of a request; see generate.generate."""

    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Returns whether each token is the most likely one."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def sampling(self) -> dict[str, float]:
        """Returns the arguments of `generate` that choose the tokens."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}


def read_settings(given: Mapping[str, Any], task: str) -> Settings:
    """Returns the settings of a task's `generation_kwargs`, which stay as they are: lmms-eval's cache compares them.

    As in lmms-eval's LLaVA model an answer has up to 1024 tokens, a temperature above 0 samples, and `until` is not
    applied; but `do_sample: false` always decodes greedily.

    Raises:
      ValueError: a setting asks for what is not supported; the message names the task.
    """
    if (given.get("num_beams") or 1) != 1:
        raise ValueError(f"task {task}: num_beams={given['num_beams']} is not supported: give --gen_kwargs num_beams=1")
    if unknown := sorted(set(given) - KNOWN - NOT_APPLIED):
        _warn_once(f"task {task}: these generation settings are not known and not applied: {', '.join(unknown)}")
    names = {name: name for name in Settings._fields} | {"max_tokens": "max_new_tokens"}
    chosen = {own: given[name] for own, name in names.items() if given.get(name) is not None}
    settings = Settings(**chosen)
    if given.get("do_sample") is False or settings.temperature == 0:
        settings = settings._replace(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    return settings


def read_batch_size(batch_size: int | str | None, max_batch_size: int | None) -> int | None:
    """Returns the most questions of a batch that --batch_size and --max_batch_size ask for; None for as many as fit.

    Raises:
      ValueError: it is no number above 0, and not "auto".
    """
    if batch_size is None or batch_size == 1 or str(batch_size).startswith("auto"):  # a 1 that was given is text
        return max_batch_size
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"--batch_size {batch_size}: give a number from 1, or auto")
    return int(batch_size)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning(message)


def read_row(text: str, name: str, load: Callable[[], Sequence[Any]]) -> Row:
    """Returns a request as a row; equal images of several requests have one name, so that a batch encodes them once.

    Args:
      text: what lmms-eval asks.
      name: name of the request for messages.
      load: returns its images, each time it is called.

    Raises:
      ValueError: something is no Pillow image, but a video or a sound.
    """
    pictures = []
    for number, image in enumerate(load()):
        if not isinstance(image, PIL.Image.Image):
            kind = type(image).__name__
            raise ValueError(f"{name} asks about an object of type {kind}: this model reads images and text alone")
        digest = hashlib.blake2b(image.tobytes(), digest_size=8, salt=repr((image.mode, image.size)).encode()[:16])
        pictures.append(Picture(f"image {digest.hexdigest()}", functools.partial(_read, load, number)))
    return Row(name, text, tuple(pictures), None)


def _read(load: Callable[[], Sequence[PIL.Image.Image]], number: int) -> bytes:
    """Returns an image as BMP, which is written and read fast, or as PNG if it has transparency."""
    image, buffer = load()[number], io.BytesIO()
    if image.has_transparency_data:
        image.convert("RGBA").save(buffer, "PNG", compress_level=1)
    else:
        image.convert("RGB").save(buffer, "BMP")
    return buffer.getvalue()


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of a request.

    Raises:
      ValueError: the text has marks, but not one for each image.
    """
    pieces = row.question.split(MARK)
    if not row.pictures or len(pieces) == 1:
        return ask_lmms_eval(row, row.question)
    if len(pieces) != len(row.pictures) + 1:
        raise ValueError(f"its text has {len(pieces) - 1} {MARK} marks for {len(row.pictures)} images")
    content: list[str | int] = [pieces[0]]
    for number, piece in enumerate(pieces[1:]):
        content += [number, piece]
    return ask(*(part for part in content if part != ""))


PROTOCOL = Protocol("lmms-eval", "lmms-eval", prompt, None, Settings().max_tokens, "scored by lmms-eval")
