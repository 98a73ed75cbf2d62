"""Scores answers to MathVista by rules alone: what a judge would extract from an answer is taken to be the answer.

type                  answer          right   score        type                 answer    right    score
options "1", "2"      "(B) 2" "B"     "2"     1            integer              "5.7"     "5"      1
options "1", "2"      "b"             "2"     0            integer              "$5"      "5"      0
options "200", "300"  "two hundred"   "200"   1            float, two places    "0.666"   "0.67"   1
options "1", "2"      ""              "1"     1            float, two places    "0.6"     "0.60"   0

A text that is no option counts as the option with the least edit distance, of equal ones as the first: so the empty
answer may be right.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from fastvlm_jax.evaluate.scores.anls import distance

_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
_QUOTED = re.compile(r'The answer is "(.*)"\.')


def extract(answer: str, options: Sequence[str], answer_type: str) -> str:
    """Returns the part of an answer that is compared: an option, a number or a quoted text, else the whole answer.

    Source: lmms-eval 0.7.3, tasks/mathvista/mathvista_evals.py, extract_answer with quick_extract; the whole answer
    stands where that asks a judge.

    Args:
      options: texts of the options; empty for a free-form question.
      answer_type: "text", "integer", "float" or "list".
    """
    kinds = {"integer": int, "float": float}
    if answer in options:
        return answer
    if answer_type in kinds:
        try:
            return str(kinds[answer_type](answer))
        except ValueError:
            pass
    quoted = _QUOTED.search(answer)
    return quoted[1] if quoted else answer


def normalise(extraction: str, options: Sequence[str], answer_type: str, precision: int) -> str | None:
    """Returns the extraction in the form of the references: an option's text, or a number; None if it is no number.

    Source: lmms-eval 0.7.3, tasks/mathvista/mathvista_evals.py, normalize_extracted_answer. Its precision arrives as
    1.0 or 2.0, of which `round` makes an error and lmms-eval None: there, every float question is wrong. Here it is a
    whole number, as in MathVista's own calculate_score.py, and float questions can be right.

    Args:
      precision: decimal places of a float.
    """
    try:
        if options:
            return _option(extraction.strip(), options)
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), precision))
        return extraction
    except (ValueError, OverflowError):
        return None


def _option(text: str, options: Sequence[str]) -> str:
    if bracket := _BRACKETS.search(text):
        text = bracket[1].upper()
    letters = ascii_uppercase[: len(options)]
    if text in tuple(letters):
        return options[letters.index(text)]
    return min(options, key=lambda option: distance(text, option))
