"""Reads the letter of an option in answers to AI2D, by the rule of lmms-eval.

answer, B is right   letter        answer, B is right   letter
"B" "b" "(B)"        B             "B) frog" "frog"     -
"B. frog"            B             "Answer: B"          -
"""

import re
import string

_LETTER = re.compile(r"\s*([A-Z])\.")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(answer: str, letters: str) -> str | None:
    """Returns the capital before a full stop at the start of the answer; else the whole answer, if it is a letter.

    Signs of ASCII punctuation are deleted, and case does not count, before the comparison.

    Source: lmms-eval 0.2.1 to 0.7.3, tasks/ai2d/utils.py, MultiChoiceRegexFilter, and its metric exact_match with
    ignore_case and ignore_punctuation.
    """
    start = _LETTER.match(answer)
    text = (start[1] if start else answer).lower().translate(_PUNCTUATION)
    return next((letter for letter in letters if letter.lower() == text), None)
