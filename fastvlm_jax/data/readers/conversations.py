"""Turns the conversations of published data sets into our turns: roles, and the place of each image.

{"from": "human", "value": "<image>\\nwhat color?"}   ->  ("user", (0, "what color?"))
{"role": "user", "content": "compare <image> and <image>"}   ->  ("user", ("compare", 1, "and", 2))
"""

import zlib
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.text.conversation import Turn, answered
from fastvlm_jax.text.prompt import MARK, ROLES, split_marks

MAX_NAME = 80  # most characters of a name or value that an error message repeats


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
    if isinstance(messages, list) and not messages:
        raise ValueError("the conversation is empty")
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f"the conversation is {shown(messages)}, not a list of messages")
    talk = [_role_and_text(message) for message in messages]
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


def _role_and_text(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"a message is {shown(message)}, not an object with from and value")
    named = message.get("from") if "from" in message else message.get("role")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"a message is from {shown(named)}: the roles are {', '.join(ROLES)}")
    content = message.get("value") if "value" in message else message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return role, "".join(_piece(piece) for piece in content)
    return role, text_of(content, "a message")


def _piece(piece: Any) -> str:
    """Returns the text of one element of a content list; an image becomes its mark."""
    kind = piece.get("type") if isinstance(piece, dict) else piece
    if kind == "text":
        return text_of(piece.get("text"), "a text of a message")
    if kind in ("image", "image_url"):
        return MARK
    raise ValueError(f"a message holds a part of type {shown(kind)}: only text and image are known")
