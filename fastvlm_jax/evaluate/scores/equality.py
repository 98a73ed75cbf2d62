"""Scores a short answer by equality, after the little that a harness normalises."""

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_punctuation(text: str) -> str:
    """Returns a text in lower case without the ASCII punctuation; white space stays."""
    # lmms-eval's texts lie in arrays that cannot grow: of "\u0130", whose lower case is two letters, the last is cut.
    return text.lower()[: len(text)].translate(_NO_PUNCTUATION)


def lmms_eval(prediction: str, reference: str) -> float:
    """Returns 1.0 if both texts are equal in lower case and without ASCII punctuation, else 0.0.

    Source: the metric exact_match, with ignore_case and ignore_punctuation, of lmms-eval 0.2.1, 0.2.3 and 0.7.3
    (api/metrics.py).
    """
    return float(without_punctuation(prediction) == without_punctuation(reference))
