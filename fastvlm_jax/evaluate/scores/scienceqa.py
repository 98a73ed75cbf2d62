"""Reads the letter of an option in answers to ScienceQA, by the rules of LLaVA and of two versions of lmms-eval.

answer, B is right   LLaVA   0.7.3   0.2        answer, B is right   LLaVA   0.7.3   0.2
"B"                  B       B       B          "B. leaf"            B       B       -
"b"                  -       B       B          "B."                 -       B       -
"The answer is B."   B       -       -          "(B)"                -       -       -

An answer is right if the letter is the reference; where no letter is read, it is wrong.
"""

import re

LLAVA_LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last sign is any one sign


def read_llava(answer: str, letters: str) -> str | None:
    """Returns the letter alone, before ". ", or in the one sentence "The answer is X." of the answer.

    Source: LLaVA, eval/eval_science_qa.py. Case counts.

    Args:
      letters: letters of the row's options, as "ABC".
    """
    found = _SENTENCE.findall(answer)
    if answer in tuple(LLAVA_LETTERS):
        letter = answer
    elif answer[:1] in tuple(LLAVA_LETTERS) and answer[1:3] == ". ":
        letter = answer[0]
    else:
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in tuple(letters[: len(LLAVA_LETTERS)]) else None


def read_lmms_eval_0_7(answer: str, letters: str) -> str | None:
    """Returns the letter that is the whole answer, in either case, or a capital at its start with a full stop.

    Source: lmms-eval 0.7.3, tasks/scienceqa/utils.py, sqa_process_results.
    """
    if (whole := read_lmms_eval_0_2(answer, letters)) is not None:
        return whole
    first = answer[:1]
    return _letter(first, letters) if first.isupper() and answer[1:2] == "." else None


def read_lmms_eval_0_2(answer: str, letters: str) -> str | None:
    """Returns the letter that is the whole answer, in either case.

    Source: lmms-eval 0.2.1 and 0.2.3, the same function. It makes the answer lower-case first, so that its rule for a
    capital with a full stop never holds.
    """
    return _letter(answer, letters)


def _letter(text: str, letters: str) -> str | None:
    return next((letter for letter in letters if letter.lower() == text.lower()), None)
