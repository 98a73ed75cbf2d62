"""Turns the conversations of published data sets into our turns: roles, and the place of each image.

{"from": "human", "value": "<image>\\nwhat color?"}   ->  ("user", (0, "what color?"))
{"role": "user", "content": "compare <image> and <image>"}   ->  ("user", ("compare", 1, "and", 2))

Messages may hold images themselves, in parts as chat interfaces have them, or in the text as Qwen-VL has them:

{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "what color?"}]}
{"from": "human", "value": "<img>a.jpg</img> what color?"}
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.text.conversation import Turn, answered
from fastvlm_jax.text.prompt import MARK, ROLES, split_marks

MAX_NAME = 80  # most characters of a name or value that an error message repeats
Talk = list[tuple[str, str]]  # (role, text with a mark for each image)
PART_KEYS = ("image", "path", "url", "image_url", "source", "data", "base64", "bytes")  # where a part holds its image
_KINDS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
}  # fmt: skip
_QWEN = re.compile(r"<img>([^<>\r\n]{1,4096})</img>")
_MARK_OR_QWEN = re.compile(f"{MARK}|{_QWEN.pattern}")
# Marks of other models and of videos, and pictures in a text: as plain text they would teach the letters. Tags of HTML
# and XML that are closed again, and anything in backticks, are talk about code.
_FOREIGN = re.compile(
    r"(?<!`)(?:<(video|audio|Video|Audio|VIDEO|AUDIO|Image|IMAGE|Img|IMG)>"
    r"|<(?:image|Image|img|video|audio)[ _-]?\d{1,3}>"
    r"|<\|(?:image|img|video|audio|vision)(?:_(?:pad|start|end|bos|eos|\d{1,3}))?\|>"
    r"|<(?:image_pad|image_placeholder|image_token|image_soft_token|start_of_image|end_of_image|ImageHere|IMG_CONTEXT"
    r"|im_patch|fake_token_around_image)>|</image>"
    r"|\[(?:IMG|IMAGE|VIDEO)(?:_?\d{1,3}|_END|_BREAK)?\]"
    r"|^[ \t]*<img>|<img>[ \t]*$"
    r"|data:image/[\w.+-]+;base64,(?=[A-Za-z0-9+/]{16}))",
    re.MULTILINE,
)


def to_turns(messages: Any, num_images: int) -> tuple[Turn, ...]:
    """Returns the turns of a conversation about `num_images` images.

    A message is a mapping of `from` and `value` (LLaVA) or `role` and `content` (OpenAI, where content may be a list of
    `{"type": "text", "text": ...}` and `{"type": "image"}`). The i-th `<image>` mark of the conversation is image i. In
    a turn with one mark the image comes first, as in LLaVA's `preprocess_multimodal`; with several marks the order is
    kept. If there is one image and no mark, the image opens the user's first turn. A leading turn of the assistant and
    a last question without an answer are left out, see `answered`.

    Raises:
      ValueError: the conversation is malformed or has another number of images; the message is a short line.
    """
    return place(read_messages(messages)[0], num_images)


def read_messages(messages: Any) -> tuple[Talk, list[Any]]:
    """Returns the talk of a conversation and, for each mark in it, the image that the message itself holds, or None.

    Messages are as in `to_turns`, or an object of lists, {"from": [...], "value": [...]}.

    Raises:
      ValueError: the conversation is malformed, or holds a mark that stands for no image; the message is a short line.
    """
    messages = as_list(messages)
    if isinstance(messages, list) and not messages:
        raise ValueError("the conversation is empty")
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"the conversation is {shown(messages)}, not a list of messages")
    talk: Talk = []
    held: list[Any] = []
    for message in messages:
        role, content = _role_and_content(message)
        texts = [content] if isinstance(content, str) else content
        talk.append((role, "".join(_text_and_images(part, held) for part in texts)))
    return talk, held


def place(talk: Talk, num_images: int) -> tuple[Turn, ...]:
    """Returns the turns of a talk about `num_images` images, as `to_turns` describes."""
    talk = list(talk)
    marks = sum(text.count(MARK) for _, text in talk)
    if num_images == 1 and not marks:
        first = next((i for i, (role, _) in enumerate(talk) if role == "user"), None)
        if first is None:
            raise ValueError("the conversation has an image but no turn of the user")
        talk[first] = ("user", MARK + talk[first][1])
    elif marks != num_images:
        raise ValueError(f"the conversation has {marks} {MARK} marks for {num_images} images")
    turns, seen = [], 0
    for role, text in talk:
        turns.append((role, split_marks(text, seen)))
        seen += text.count(MARK)
    return answered(turns)


def about_image(caption: str, key: str, questions: Sequence[str]) -> tuple[Turn, ...]:
    """Returns a conversation about image 0 that `caption` answers.

    The user's turn is the image and one of `questions`, picked by `key`; without questions, the image alone.
    """
    if MARK in check_marks(caption):
        raise ValueError(f"the caption holds {MARK}: a caption is about its one image, and marks none")
    asked = (questions[zlib.crc32(key.encode()) % len(questions)],) if questions else ()
    return (("user", (0, *asked)), ("assistant", (caption,)))


def text_of(value: Any, what: str) -> str:
    """Returns `value` if it is text that UTF-8 can encode; otherwise raises ValueError, which calls it `what`."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} holds half a surrogate pair, which is no text") from error
    return value


def shown(value: Any) -> str:
    """Returns a value as error messages repeat it, in one line of at most MAX_NAME characters.

    Numbers, None and texts appear as in Python; anything else appears as the name of its type.
    """
    text = repr(value) if isinstance(value, int | float | bool | None) else type(value).__name__
    if isinstance(value, str):
        text = repr(value[:MAX_NAME])
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 3] + "..."


def as_list(value: Any) -> Any:
    """Returns an object of lists, as tables store objects, as a list of objects; any other value as it is."""
    if isinstance(value, dict) and value and all(isinstance(column, list | tuple) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"the lists of {shown(', '.join(map(str, value)))} differ in length")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def check_marks(text: str) -> str:
    """Returns a text; raises ValueError, which names the mark, if it holds one that stands for no image here."""
    if "<" not in text and "[" not in text and "data:" not in text:
        return text  # the usual case, which need not be searched
    for found in _FOREIGN.finditer(text):
        if not (found[1] and f"</{found[1]}>" in text):
            raise ValueError(f"a text holds {shown(found[0].strip())}: an image of the entry is marked {MARK}")
    return text


def _role_and_content(message: Any) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"a message is {shown(message)}, not an object with from and value")
    named = message.get("from") if "from" in message else message.get("role")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"a message is from {shown(named)}: the roles are {', '.join(ROLES)}")
    content = message.get("value") if "value" in message else message.get("content")
    if not isinstance(content, str | list | tuple):
        text_of(content, "a message")
    return role, content


def _text_and_images(part: Any, held: list[Any]) -> str:
    """Returns the text of a part of a message, with a mark for each image, and adds to `held` what it holds."""
    if isinstance(part, str):
        text = text_of(part, "a message")
        if "<" in text:
            held += [None if found[0] == MARK else found[1] for found in _MARK_OR_QWEN.finditer(text)]
            text = _QWEN.sub(MARK, text)
        return check_marks(text)
    kept = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    images = [key for key in PART_KEYS if kept.get(key) not in (None, "")]
    named = kept.get("type", "image" if images else "text" if "text" in kept else part)
    kind = _KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise ValueError(f"a message holds a part of type {shown(named)}: only text and image are known")
    if kind == "text":
        if images:
            raise ValueError(f"a part of type text holds {images[0]}: make it a part of type image")
        return _text_and_images(text_of(kept.get("text"), "a text of a message"), held)
    if kept.get("index", len(held)) != len(held) and not images:
        raise ValueError(f"a message places image {shown(kept['index'])} where image {len(held)} is the next")
    held.append(kept[images[0]] if images else None)
    return MARK
