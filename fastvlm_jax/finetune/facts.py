"""Measures what a data set asks of a training run: sizes, lengths, number of pictures, and the kind of its answers."""

from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.inspect.contents import READ, some
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.processor import Processor

TURNS = "conversation"  # a record with several questions shows its pictures once


class Facts(NamedTuple):
    """Describes the training split of a data set.

    Attributes:
      records: records that can be used.
      unusable: records that cannot.
      pictures: pictures in them.
      most_pictures: pictures of the record that has most.
      text_only: share of the records without a picture.
      side: longer side that nine of ten pictures do not exceed, pixels; 0 without pictures.
      text: mean number of text tokens of a record.
      longest: text tokens of the longest record.
      words: words of the median answer.
    """

    records: int
    unusable: int
    pictures: int
    most_pictures: int
    text_only: float
    side: int
    text: float
    longest: int
    words: float


def measure(source: RecordSource, processor: Processor, template: str) -> Facts:
    """Measures a split with the tokenizer and template of a model.

    Raises:
      ValueError: the split holds no record that can be used; the message gives the first reason.
    """
    index = load_index(source, Counter(processor.tokenizer, template, TURNS))
    if not len(index.text):
        why = next(iter(index.unusable.values()), "it is empty")
        raise ValueError(f"no record of {source.folder}, split {source.split!r}, can be used: {why}")
    usable = index.num_segments > 0
    sides = np.maximum(index.width, index.height)
    return Facts(
        records=int(usable.sum()),
        unusable=len(index.unusable),
        pictures=int(index.num_images[usable].sum()),
        most_pictures=int(index.num_images[usable].max()),
        text_only=float((index.num_images[usable] == 0).mean()),
        side=int(np.quantile(sides, 0.9, method="higher")) if len(sides) else 0,
        text=float(index.text.mean()),
        longest=int(index.text.max()),
        words=float(np.median([len(answer.split()) for answer in answers_of(source)])),
    )


def answers_of(source: RecordSource) -> list[str]:
    """Returns the answers in some records of a split, at most READ of them."""
    found = []
    for number in some(len(source), READ).tolist():
        try:
            turns = source[number].turns
        except ValueError:  # a damaged record, which the index counts as unusable
            continue
        answers = (content for role, content in turns if role == "assistant")
        found += [" ".join(part for part in content if isinstance(part, str)).strip() for content in answers]
    return found or [""]
