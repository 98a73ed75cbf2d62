"""Reads the letter of an option in answers to the multiple-choice questions of MMMU.

options $6 $7 $8 $9     answer                                            letter
                        "B."  "Answer: (B) $7"  "A or B"                  B
                        "I think the correct value here is $7 per unit"   B
                        "BAD idea"                                        D, the D with a space behind it
                        "b"  "**B**"  "$7"  ""                            none: a guess
"""

import random
from collections.abc import Callable, Sequence
from string import ascii_uppercase

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_MANY_WORDS = 5  # the text of an option counts only in answers of more words


def read(answer: str, options: Sequence[str]) -> str | None:
    """Returns the letter in brackets; else before a space; else before a full stop; else that of a text in the answer.

    Of several, it is the last in the answer: of those in brackets by the last "(X)", of the other letters by the last
    "X" between spaces, of texts by their last place.

    Source: lmms-eval 0.2.1 to 0.7.3, tasks/mmmu/utils.py, parse_multi_choice_response, after MMMU's eval_utils.py.
    """
    text = answer
    for sign in _ENDS:
        text = text.strip(sign)
    text = f" {text} "
    letters = ascii_uppercase[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return _last(found, lambda letter, place=place: text.rfind(place.format(letter)))
    if len(text.split()) <= _MANY_WORDS:
        return None
    lower = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}
    found = [letter for letter, option in lower.items() if option in text.lower()]
    return _last(found, lambda letter: text.lower().rfind(lower[letter])) if found else None


def _last(letters: Sequence[str], place: Callable[[str], int]) -> str:
    return max(letters, key=place)  # of equal places, the first


def guess(identity: str, options: Sequence[str]) -> str:
    """Returns a letter at random, always the same for a question, whatever was asked before it.

    lmms-eval draws from one generator for the whole run, so that its guess depends on the number of guesses before.

    Args:
      identity: the question's id.
    """
    return random.Random(identity).choice(ascii_uppercase[: len(options)])
