"""The record, the unit of a data set: encoded images and the conversation about them."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import msgpack

from fastvlm_jax.text.conversation import Turn, split_system

# Far above real data sets: the index counts to 65,535, and truncation is not made for longer conversations.
MAX_IMAGES, MAX_TURNS = 1_000, 4_000


@dataclasses.dataclass(frozen=True)
class Record:
    """Holds encoded images and the conversation about them.

    Attributes:
      key: name of the record in messages, such as "train/17".
      images: encoded files (JPEG, PNG ...), unchanged.
      turns: (role, content) pairs in order; content holds texts, and ints that are indices into `images`.
      extra: further data of the source (synthetic captions, teacher embeddings ...), of types that msgpack supports.
    """

    key: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Rejected(NamedTuple):
    """Describes a source entry that cannot become a record; `reason` is one short line."""

    file: str
    key: str
    reason: str


def pack(record: Record) -> bytes:
    """Returns the bytes of `record` as a shard stores them (msgpack)."""
    raw = {"key": record.key, "images": record.images, "turns": record.turns}
    return msgpack.packb(raw | ({"extra": record.extra} if record.extra else {}))


def unpack(data: bytes) -> Record:
    """Returns the record that `pack` turned into `data`.

    Raises:
      ValueError: `data` is not a record, or holds more than MAX_IMAGES images.
    """
    try:
        raw = msgpack.unpackb(data)
        turns = tuple((str(role), tuple(content)) for role, content in raw["turns"])
        record = Record(str(raw["key"]), tuple(raw["images"]), turns, dict(raw.get("extra", {})))
        numbers = [part for _, content in turns for part in content if not isinstance(part, str)]
        if len(record.images) > MAX_IMAGES:
            raise ValueError(f"it has more than {MAX_IMAGES:,} images")
        if all(isinstance(image, bytes) for image in record.images) and all(
            type(number) is int and 0 <= number < len(record.images) for number in numbers
        ):
            return record
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(f"not a record: {type(error).__name__} {error}") from error
    raise ValueError(f"record {record.key} names an image that it does not hold")


def check(record: Record) -> str | None:
    """Returns why a record cannot be used for training, in one short line; None if it can."""
    named = [part for _, content in record.turns for part in content if not isinstance(part, str)]
    if len(record.turns) > MAX_TURNS or max(len(record.images), len(named)) > MAX_IMAGES:
        return f"it has more than {MAX_TURNS:,} turns or {MAX_IMAGES:,} images"
    _, talk = split_system(record.turns)
    roles = [role for role, _ in talk]
    if not roles:
        return "the conversation is empty"
    if roles[0] != "user":
        return f"the conversation starts with {roles[0]!r}, not with the user"
    if len(roles) == 1:
        return "the conversation has no answer"
    if roles != ["user", "assistant"] * (len(roles) // 2):
        if roles[-1] == "user" and roles[:-1] == ["user", "assistant"] * (len(roles) // 2):
            return "the last question has no answer"
        for number, (role, following) in enumerate(itertools.pairwise(roles), 1):
            if role == following:
                return f"turns {number} and {number + 1} are both of the {role}: join them, or leave one out"
        return "the turns do not alternate between user and assistant"
    for _, content in talk[1::2]:
        if not any(isinstance(part, str) and part.strip() for part in content):
            return "an answer is empty"
    if missing := sorted(set(named) - set(range(len(record.images)))):
        return f"the conversation names image {missing[0]} (counted from 0), the record holds {len(record.images)}"
    return None
