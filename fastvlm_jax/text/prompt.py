"""Turns what a person asks into turns: a text, or a conversation in the forms of transformers, LLaVA or our own.

"what color?"  or  "<image>\\nwhat color?"                    ->  ("user", (0, "what color?"))
"compare <image> and <image>"                                ->  ("user", ("compare", 0, "and", 1))
[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "why?"}]
                                       ->  ("user", ("hi",))  ("assistant", ("hello",))  ("user", ("why?",))
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvlm_jax.text.conversation import Content, Turn, split_system

MARK = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IMAGE_KEYS = ("image", "path", "url", "image_url")  # where a part of a message holds its image


class Prompt(NamedTuple):
    """Holds what is asked, before its images are numbered.

    Attributes:
      name: name of the prompt in messages.
      talk: (role, text with a mark for each image) or, in our own form, (role, content) pairs.
      images: images that the messages themselves hold, in the order of their marks.
    """

    name: str
    talk: tuple[tuple[str, str | Content], ...]
    images: tuple[Any, ...] = ()


def read_prompts(prompts: Any) -> list[Prompt]:
    """Reads one prompt or a list of them, each a text or a conversation that ends with a question.

    A conversation is a list of messages, each a dict of `role` and `content` (OpenAI, transformers) or `from` and
    `value` (LLaVA), or a turn of our own: (role, text) or (role, (text, number of an image, ...)). Content is a text or
    a list of parts: {"type": "text", "text": ...} and {"type": "image"}, which may hold its image as `image`, `path`
    or `url`, or {"type": "image_url", "image_url": {"url": ...}}.

    Raises:
      ValueError: a prompt has another form; the message is one line that names it.
    """
    if isinstance(prompts, str) or _is_conversation(prompts):
        named = [("prompts", prompts)]
    elif isinstance(prompts, list | tuple):
        named = [(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
    else:
        raise ValueError(f"prompts must be a text, a list of messages, or a list of them, not {kind_of(prompts)}")
    found = []
    for name, prompt in named:
        try:
            found.append(_read(name, prompt))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def place_images(prompt: Prompt, images: Sequence[int], chat: bool = True) -> tuple[Turn, ...]:
    """Returns the turns of a prompt about the images of these numbers.

    The i-th `<image>` mark, or the number i in a turn of our own form, is images[i]; marks are placed as in training,
    see `split_marks`. Without either, the images open the user's first turn, in order.

    Args:
      prompt: what is asked.
      images: numbers of the images in the batch.
      chat: whether the template reads the user's text; without it, a prompt is one turn with an image.

    Raises:
      ValueError: the prompt marks or numbers other images than there are; the message is one line.
    """
    talk = list(prompt.talk)
    numbers = {part for _, content in talk if not isinstance(content, str) for part in content if isinstance(part, int)}
    marks = sum(content.count(MARK) for _, content in talk if isinstance(content, str))
    if numbers and (marks or numbers != set(range(len(images)))):
        raise ValueError(
            f"{prompt.name}: its turns name the images {sorted(numbers)[:8]} and hold {marks} {MARK} marks: number "
            f"each of its {len(images)} images, from 0, and write no mark"
        )
    if marks and marks != len(images):
        raise ValueError(f"{prompt.name}: it has {marks} {MARK} marks for {len(images)} images: give one for each mark")
    if not chat and (len(split_system(talk)[1]) > 1 or not images):
        raise ValueError(f"{prompt.name}: this model's template reads images, no text: give one turn, with an image")
    if not numbers and not marks:
        first = next(i for i, (role, _) in enumerate(talk) if role == "user")
        content = talk[first][1]
        opened = MARK * len(images) + content if isinstance(content, str) else (*range(len(images)), *content)
        talk[first] = ("user", opened)
    turns, seen = [], 0
    for role, content in talk:
        parts = split_marks(content, seen) if isinstance(content, str) else content
        seen += content.count(MARK) if isinstance(content, str) else 0
        turns.append((role, tuple(part if isinstance(part, str) else images[part] for part in parts)))
    return tuple(turns)


def split_marks(text: str, first_image: int) -> Content:
    """Returns the content of a turn, whose `<image>` marks are the images from number `first_image` on.

    With one mark the image comes first, as in LLaVA's `preprocess_multimodal`; with several the order is kept.
    """
    pieces = text.split(MARK)
    if len(pieces) == 1:
        return (text,)
    if len(pieces) == 2:
        text = "".join(pieces).strip()
        return (first_image, text) if text else (first_image,)
    content: list[str | int] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append(first_image + number - 1)
        # Spaces at the ends of a turn mean as little as spaces beside a mark.
        if piece := piece.strip():
            content.append(piece)
    return tuple(content)


def kind_of(value: Any) -> str:
    """Returns what error messages call a value of a wrong type."""
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and (isinstance(value[0], dict) or _is_turn(value[0]))


def _is_turn(value: Any) -> bool:
    """Returns whether a value is (role, content), and not two prompts."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _read(name: str, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(name, (("user", _text(prompt)),))
    if not isinstance(prompt, list | tuple) or not prompt:
        what = "an empty list" if isinstance(prompt, list | tuple) else kind_of(prompt)
        raise ValueError(f"it is {what}: give a text or a list of messages")
    read = [_message(message) for message in prompt]
    talk = tuple((role, content) for role, content, _ in read)
    _, dialogue = split_system(talk)
    roles = [role for role, _ in dialogue]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)] or roles[-1] != "user":
        found = ", ".join(roles[:8]) or "nothing"
        raise ValueError(f"its turns must be user, assistant, user ... and end with the user's question, not {found}")
    return Prompt(name, talk, tuple(image for _, _, images in read for image in images))


def _message(message: Any) -> tuple[str, str | Content, list[Any]]:
    """Returns the role, the content and the images that a message itself holds."""
    if isinstance(message, dict):
        named = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
    elif _is_turn(message):
        named, content = message
    else:
        raise ValueError(f"a message is {kind_of(message)}, not a dict of role and content")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        shown = repr(named[:40]) if isinstance(named, str) else kind_of(named)
        raise ValueError(f"the role of a message is {shown}: choose one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, _text(content), []
    if not isinstance(content, list | tuple):
        raise ValueError(f"the content of a message is {kind_of(content)}: give a text or a list of parts")
    if all(type(part) is int or isinstance(part, str) for part in content):
        return role, tuple(part if type(part) is int else _text(part) for part in content), []
    texts, images = zip(*map(_part, content), strict=True)
    return role, "".join(texts), [image for image in images if image is not None]


def _part(part: Any) -> tuple[str, Any]:
    """Returns the text of a part of a message, a mark for an image, and the image if the part holds it."""
    if not isinstance(part, dict):
        raise ValueError(f"a part of a message is {kind_of(part)}: give dicts, or texts and numbers of images alone")
    held = {key: value for key, value in part.items() if value is not None and key != "type"}
    kind = part.get("type")
    if kind == "text" and list(held) == ["text"]:
        return _text(held["text"]), None
    if isinstance(kind, str) and kind in ("image", "image_url") and len(held) <= 1 and set(held) <= {*_IMAGE_KEYS}:
        image = next(iter(held.values()), None)
        return MARK, image.get("url") if isinstance(image, dict) else image
    keys = ", ".join(str(key) for key in held)[:80]
    shown = repr(kind[:40]) if isinstance(kind, str) else kind_of(kind)
    raise ValueError(
        f"a part of a message has type {shown} and holds {keys or 'nothing'}: give 'text' with text, or 'image', which "
        f"may hold one of {', '.join(_IMAGE_KEYS)}"
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text is {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half a surrogate pair, which is no text") from error
    return value
