"""Keeps the images that pages have uploaded, and reads the questions about them; both come from anybody."""

import collections
import hashlib
import json
import math
import re
from typing import Any

from fastvlm_jax.chat.question import Picture, Question
from fastvlm_jax.images.decode import decode, size_of
from fastvlm_jax.text.prompt import Prompt

MAX_IMAGE = 64 << 20  # bytes of an image
MAX_QUESTION = 512 << 10  # bytes of a question, as JSON
MAX_IMAGES = 16  # images of a conversation
MAX_TURNS = 400
MAX_STORED, MAX_STORED_BYTES = 512, 512 << 20  # images that are kept, of all conversations
_NAME, _DIGEST = re.compile(r"[A-Za-z0-9_-]{1,64}"), re.compile(r"[0-9a-f]{64}")


class MissingUpload(ValueError):
    """Says that images of a question are not there, or no more.

    Attributes:
      names: their digests.
    """

    def __init__(self, names: list[str]):
        super().__init__("images of the conversation are no longer here: upload them again")
        self.names = names


def check_image(data: bytes, max_bytes: int = MAX_IMAGE) -> Picture:
    """Returns an encoded image, which is decoded once to see that it can be.

    Raises:
      ValueError: it is no image, damaged, or too large; see `images.decode.decode`.
    """
    if len(data) > max_bytes:
        raise ValueError(f"the image is over {max_bytes >> 20} MB: make it smaller")
    decode(data)
    return Picture(hashlib.sha256(data).hexdigest(), data, size_of(data))


class Uploads:
    """Keeps images by their digests: nobody can name one whose bytes he does not have. The oldest ones go first."""

    def __init__(self):
        self._pictures: collections.OrderedDict[str, Picture] = collections.OrderedDict()
        self._bytes = 0

    def add(self, picture: Picture) -> None:
        """Keeps an image; others that nobody has asked about for longest make room."""
        if picture.name not in self._pictures:
            self._bytes += len(picture.data)
        self._pictures[picture.name] = picture
        self._pictures.move_to_end(picture.name)
        while len(self._pictures) > MAX_STORED or self._bytes > MAX_STORED_BYTES:
            _, oldest = self._pictures.popitem(last=False)
            self._bytes -= len(oldest.data)

    def find(self, names: list[str]) -> tuple[Picture, ...]:
        """Returns the images of these digests.

        Raises:
          MissingUpload: some are not there.
        """
        if missing := sorted({name for name in names if name not in self._pictures}):
            raise MissingUpload(missing)
        for name in names:
            self._pictures.move_to_end(name)
        return tuple(self._pictures[name] for name in names)


def read_question(body: bytes, uploads: Uploads) -> Question:
    """Reads a question that a page has sent:

    {"conversation": "a1b2", "temperature": 0.7, "seed": 3, "turns": [
        {"role": "user", "images": [DIGEST], "text": "what is it?"},
        {"role": "assistant", "text": "a cat"},
        {"role": "user", "text": "what color is it?"}]}

    Raises:
      MissingUpload: images have not been uploaded, or no longer are there.
      ValueError: it has another form, or asks for too much; the message is one line.
    """
    try:
        content = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError("the question is not readable JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("turns"), list):
        raise ValueError("the question has no list of turns")
    name = content.get("conversation", "")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("the conversation needs a name of at most 64 letters and digits")
    if len(content["turns"]) > MAX_TURNS:
        raise ValueError(f"the conversation has more than {MAX_TURNS} turns: begin a new one")
    temperature, seed = content.get("temperature", 0.0), content.get("seed", 0)
    if type(temperature) not in (int, float) or not math.isfinite(temperature) or not 0 <= temperature <= 10:
        raise ValueError("the temperature must be a number from 0 to 10")
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise ValueError("the seed must be a whole number from 0 to 2147483647")
    turns, images = [], []
    for turn in content["turns"]:
        role, text, own = _read_turn(turn)
        turns.append((role, (*range(len(images), len(images) + len(own)), *([text] if text else []))))
        images += own
    if len(images) > MAX_IMAGES:
        raise ValueError(f"the conversation has {len(images)} images, more than {MAX_IMAGES}: begin a new one")
    if [role for role, _ in turns] != [*["user", "assistant"] * (len(turns) // 2), "user"]:
        raise ValueError("the turns must be user, assistant, user ... and end with the user's question")
    prompt = Prompt("the conversation", tuple(turns))
    return Question(name, prompt, uploads.find(images), float(temperature), seed)


def _read_turn(turn: Any) -> tuple[str, str, list[str]]:
    """Returns role, text and digests of images of a turn."""
    if not isinstance(turn, dict):
        raise ValueError("a turn of the conversation is not an object")
    role, text, images = turn.get("role"), turn.get("text", ""), turn.get("images", [])
    if role not in ("user", "assistant") or not isinstance(text, str) or not isinstance(images, list):
        raise ValueError("a turn needs a role, user or assistant, a text, and of the user a list of images")
    if not all(isinstance(image, str) and _DIGEST.fullmatch(image) for image in images):
        raise ValueError("an image of a turn is not named by its digest")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half a surrogate pair, which is no text") from error
    text = text.strip()
    if role == "user" and not (text or images):
        raise ValueError("a question needs a text or an image")
    if role == "assistant" and images:
        raise ValueError("an answer has no images")
    return role, text, images


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")
