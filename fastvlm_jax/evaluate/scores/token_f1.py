"""Token F1 of SQuAD: the overlap of the words of an answer and of a reference.

Source: `compute_f1` of SQuAD 2.0's evaluation script: lower case, no ASCII punctuation, no articles, words between
white space. Where one of both has no words, the score is 1 if neither has.
"""

import collections
import re
import string
from collections.abc import Sequence

RULE = "token F1 of SQuAD: words in lower case without punctuation and articles, best reference"
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(prediction: str, references: Sequence[str]) -> float:
    """Returns the F1 with the nearest reference, 0 to 1."""
    return max(_f1(words(prediction), words(reference)) for reference in references)


def words(text: str) -> list[str]:
    """Returns the words that are compared."""
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    same = (collections.Counter(found) & collections.Counter(wanted)).total()
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)
