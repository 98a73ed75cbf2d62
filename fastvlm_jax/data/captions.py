"""Reads the captions of a record that is a pair of an image and its caption."""

from fastvlm_jax.data.record import Record, check
from fastvlm_jax.text.conversation import split_system


def captions_of(record: Record) -> list[str]:
    """Returns the captions of a record: those of `extra["captions"]`, or its one answer.

    Raises:
      ValueError: the record is not one image and its caption; the message says why.
    """
    if wrong := check(record):
        raise ValueError(wrong)
    if len(record.images) != 1:
        raise ValueError(f"{len(record.images)} images, a pair has one")
    _, talk = split_system(record.turns)
    if len(talk) != 2:
        raise ValueError(f"{len(talk) // 2} questions are no caption")
    (_, answer) = talk[1]
    if not all(isinstance(part, str) for part in answer):
        raise ValueError("an image in the answer, a caption is text")
    return _texts(record, "captions") or ["".join(answer)]


def synthetic_captions_of(record: Record) -> list[str]:
    """Returns the synthetic captions of a record, perhaps none; raises ValueError if they are not texts."""
    return _texts(record, "synthetic_captions")


def synthetic_lists_of(record: Record) -> list[int]:
    """Returns how many synthetic captions of a record are from each list of its source, in their order.

    Raises:
      ValueError: the numbers of `extra["synthetic_keys"]` do not add up to the captions.
    """
    total, stored = len(synthetic_captions_of(record)), record.extra.get("synthetic_keys")
    if stored is None:
        return [total]
    try:
        counts = [count for _, count in stored]
        if sum(counts) == total and all(type(count) is int and count >= 0 for count in counts):
            return counts
    except (TypeError, ValueError):
        pass
    raise ValueError(f"synthetic_keys does not tell of which lists its {total} synthetic captions are")


def _texts(record: Record, key: str) -> list[str]:
    texts = record.extra.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{key} is not a list of texts")
    return texts
