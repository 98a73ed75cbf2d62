"""Finds the columns of the images, the questions and the answers among named columns; rows.py reads the rows.

Every format goes through here, so that a name means the same in all of them: the columns of Parquet files and tables,
the keys of JSON objects, the features of TFDS. The first of these layouts that the columns allow is used; names are
compared in lower case:

    conversations, messages   messages of `from` and `value` or `role` and `content`       LLaVA-OneVision
    prompt + completion       two lists of such messages                                   TRL
    texts, qa ...             pairs of `user` and `assistant`, or `question` and `answer`  The Cauldron, DocMatix
    question + answer(s)      one of each, or a list of each                               VQA sets, Alpaca
    caption, text ...         a text, or several                                           caption sets
    label                     the name of a class                                          classification sets
    json                      an object with such keys                                     tars stored as Parquet
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastvlm_jax.data.readers import pictures

# Columns that name images, or hold them; the first that has any is read.
IMAGES = (
    "image", "images", "img", "imgs", "bytes",
    "path", "filename", "file_name", "filepath", "file_path", "file", "image_path",
    "image_paths", "img_path", "img_paths", "image_file", "image_files", "image_name", "image_names", "image_filename",
    "image_url", "image_urls", "img_url", "picture", "pictures", "photo", "photos", "jpg", "jpeg", "png", "webp",
    "image_bytes", "image_data", "image_base64", "img_base64", "image_base64_str",
)  # fmt: skip
# Of these, the ones that name other files as often.
ANY_FILE = ("path", "filename", "file_name", "filepath", "file_path", "file", "bytes")
_BYTES = ("image", "images", "img", "imgs", "jpg", "jpeg", "png", "webp", "image_bytes", "image_data", "bytes")
_SOUND_OR_VIDEO = re.compile(r"(video|audio)s?(_.*)?", re.IGNORECASE | re.DOTALL)
_MESSAGES = ("conversations", "conversation", "messages")
_PAIRS = ("texts", "qa", "qas", "qa_pairs")
_QUESTIONS = ("question", "questions", "query", "prompt", "instruction", "problem")
_ANSWERS = (
    "multiple_choice_answer", "answer", "answers", "response", "output", "completion", "solution", "label",
)  # fmt: skip
CAPTIONS = (
    "caption", "captions", "recaption", "text", "texts", "txt", "title", "description", "sentence", "sentences",
)  # fmt: skip
_PAIR_KEYS = (("user", "assistant"), ("question", "answer"))
EXPECTED = (
    "an image column and one of: conversations, messages, texts of user and assistant, question and answer, caption, "
    "text, label"
)


class Plan(NamedTuple):
    """Holds the names of the columns that a record is made from.

    Attributes:
      images: columns that hold images, all of which are read.
      named: columns that name images, of which the first that has any is read.
      kind: layout of the text: "messages", "pairs", "answers", "captions", "row", or "" for none.
      texts: columns of the text.
      id: column of the row's id, or None.
      others: all other columns; nothing that looks like a picture may be in them.
    """

    images: tuple[str, ...]
    named: tuple[str, ...]
    kind: str
    texts: tuple[str, ...]
    id: str | None
    others: tuple[str, ...]

    @property
    def needed(self) -> tuple[str, ...]:
        """Returns all columns but the others, each once."""
        identity = (self.id,) if self.id else ()
        return tuple(dict.fromkeys((*self.images, *self.named, *self.texts, *identity)))


def plan(kinds: Mapping[str, str]) -> Plan:
    """Returns the plan for a table's columns.

    Args:
      kinds: column name -> "image" (encoded images), "binary", "text", "messages", "pairs", "object" or "other".

    Raises:
      ValueError: the columns fit no known layout; the message names them.
    """
    found = try_plan(kinds)
    if not found.kind:
        raise ValueError(f"the columns are {', '.join(kinds) or 'none'}: expected are {EXPECTED}")
    return found


def try_plan(kinds: Mapping[str, str]) -> Plan:
    """Returns the plan for the columns of one row, as `plan` does; its kind is "" if they fit no known layout."""
    return _plan(tuple(kinds.items()))


@functools.lru_cache(maxsize=16)  # the rows of a file have few sets of columns
def _plan(columns: tuple[tuple[str, str], ...]) -> Plan:
    kinds = dict(columns)
    lower = {name.lower(): name for name in kinds}
    images = tuple(
        name
        for name, kind in kinds.items()
        if (kind == "image" and not sound_or_video(name)) or (kind == "binary" and name.lower() in _BYTES)
    )
    named = tuple(
        lower[name]
        for name in IMAGES
        if name in lower
        and lower[name] not in images
        and kinds[lower[name]] not in ("messages", "pairs")
        and (name not in ANY_FILE or kinds[lower[name]] == "text")
    )
    kind, texts = _layout({name.lower(): kind for name, kind in kinds.items()}, bool(images or named))
    texts = tuple(lower[name] for name in texts)
    identity = next((lower[name] for name in ("id", "image_id", "question_id") if name in lower), None)
    used = {*images, *named, *texts, identity}
    return Plan(images, named, kind, texts, identity, tuple(name for name in kinds if name not in used))


def _layout(kinds: Mapping[str, str], pictured: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the layout and its columns, of columns named in lower case; ("", ()) if they fit none."""

    def first(names: Iterable[str], kind: str) -> str | None:
        return next((name for name in names if kinds.get(name) == kind), None)

    if kinds.get("prompt") == kinds.get("completion") == "messages":
        return "messages", ("prompt", "completion")
    if messages := first(_MESSAGES, "messages") or first(kinds, "messages") or first(_MESSAGES, "text"):
        return "messages", (messages,)
    if pairs := first(kinds, "pairs"):
        return "pairs", (pairs,)
    question, answer = first(_QUESTIONS, "text"), first(_ANSWERS, "text")
    if question and answer:
        context = ("input",) if question == "instruction" and kinds.get("input") == "text" else ()
        return "answers", (question, answer, *context)
    if pairs := first(_PAIRS[1:], "text"):
        return "pairs", (pairs,)
    if (caption := first((*CAPTIONS, "label"), "text")) and pictured:
        return "captions", (caption,)
    if kinds.get("json") in ("text", "object"):
        return "row", ("json",)
    return "", ()


def sound_or_video(name: str, itself: bool = False) -> str | None:
    """Returns "sound" or "video" for the name of a column about one, or only of one that holds it; else None."""
    match = _SOUND_OR_VIDEO.fullmatch(name)
    about = match is not None and not (itself and match[2])
    return {"audio": "sound", "video": "video"}[match[1].lower()] if about else None


def kind_of(name: str, value: Any) -> str:
    """Returns what a record can take from a value of a row; the kinds are those of `plan`."""
    name = name.lower()
    inner = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(inner, bytes):
        return "image" if name in _BYTES or pictures.is_picture(inner) else "other"
    if isinstance(inner, dict) and name not in IMAGES:
        listed = inner is not value or all(isinstance(column, list | tuple) for column in inner.values())
        if listed and is_messages(inner):
            return "messages"
        if listed and pair_keys(inner):
            return "pairs"
        if isinstance(inner.get("bytes"), bytes):
            return "image"
    if isinstance(inner, str):
        return "text"
    if name in _MESSAGES and value is not None:
        return "messages"  # what is wrong with them is told when they are read
    return "object" if isinstance(value, dict) else "other"


def is_messages(keys: Iterable[str]) -> bool:
    """Returns whether an object with these keys is a message."""
    return {"from", "value"} <= set(keys) or {"role", "content"} <= set(keys)


def pair_keys(keys: Iterable[str]) -> tuple[str, str] | None:
    """Returns the keys of the question and the answer in an object with these keys, None if it is no pair."""
    return next((pair for pair in _PAIR_KEYS if {*pair} <= set(keys)), None)
