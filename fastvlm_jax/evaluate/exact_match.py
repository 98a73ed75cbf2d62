"""The one rule by which an answer counts as right: it equals the reference once both are normalised."""

import unicodedata

from fastvlm_jax.evaluate.benchmark import Mark, Row

RULE = (
    "equal after Unicode NFC, case folding, one space for each run of white space, none at the ends, no final full stop"
)


def normalise(text: str) -> str:
    """Returns a text as `matches` compares it; RULE describes it."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.removesuffix(".").rstrip()


def matches(answer: str, truth: str) -> bool:
    """Returns whether an answer counts as right."""
    return normalise(answer) == normalise(truth)


def mark(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer, which is right if it matches any reference."""
    return Mark(float(any(matches(answer, reference) for reference in row.references)), normalise(answer))


def identical(answer: str, truth: str) -> bool:
    """Returns whether an answer equals the reference exactly, but for white space at the ends.

    Generated answers are stripped, and the end of a reference in a data set is often a line break.
    """
    return answer.strip() == truth.strip()
