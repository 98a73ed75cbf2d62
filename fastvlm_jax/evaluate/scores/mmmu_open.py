"""Scores answers to the open questions of MMMU: a right text is contained in the answer, or a right number is in it.

answer                   right    score        answer        right   score
"The answer is 3.14"     "3.14"   1            "two"         "2"     0
"3.149"                  "3.15"   1            "25"          "2"     0
"It is Paris, France"    "paris"  1            "-5"          "5"     0
"1,000"                  "1000"   1            "[2,3]"       "2"     0

Source: lmms-eval 0.2.1 to 0.7.3, tasks/mmmu/utils.py, parse_open_response and eval_open, after MMMU's eval_utils.py.
"""

import re
from collections.abc import Sequence

_MARKS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1.5
)


def score(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if a right text is in a text of the answer, or a right number equals one of its numbers, else 0.0."""
    right = [value for reference in references for value in _normalise(reference)]
    texts = [value for value in right if isinstance(value, str)]
    for value in read(prediction):
        if any(text in value for text in texts) if isinstance(value, str) else value in right:
            return 1.0
    return 0.0


def read(answer: str) -> list[str | float]:
    """Returns the texts and numbers of an answer that are compared: its tails, and the numbers in them.

    A tail is what follows the last of the words that announce an answer, the shortest of each line. An answer without
    such words is its own tail.
    """
    tails = _tails(answer)
    numbers = [number for tail in tails for form in _NUMBERS for number in form.findall(tail)]
    return [value for text in (*tails, *numbers) for value in _normalise(text)]


def _tails(answer: str) -> list[str]:
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for mark in (*_MARKS, "=") if number == len(lines) else _MARKS:  # the last line may be an equation
            if mark in line:
                tail = line.split(mark)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [text]


def _normalise(text: str) -> list[str | float]:
    """Returns a number, to two places, if the text is one; else the text in lower case, a single letter twice.

    A space before or behind the letter keeps it from being found inside a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
