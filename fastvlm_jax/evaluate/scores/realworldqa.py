"""Rules of RealWorldQA: a letter of its options, a word or a number.

Source: lmms-eval 0.2.x and 0.7.3, tasks/realworldqa: its YAML and utils.py. The YAML of 0.2.x names filters and the
metric exact_match without case and punctuation; the function `realworldqa_process_results` beside it is not used.
"""

import re

from fastvlm_jax.evaluate.scores import letters

RULE_0_2 = "number words as digits, an option's text as its letter; then the same text but for case and punctuation"
RULE_0_7 = f"options A to D: {letters.RULE}; other answers: the same text but for case and full stops at its end"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}
_OPTION = re.compile(r"\b[A-Z]\.\s+([^\n]*)")
_SIGN = re.compile(r"[^\w\s]")


def parse_0_2(prediction: str, question: str) -> str:
    """Returns the answer as 0.2.x compares it: by `equality.lmms_eval` with the reference.

    The first option whose text stands in the answer becomes its letter, counted from A in the order of the options of
    the question; of options of the same text it is the last.
    """
    text = _SIGN.sub("", _DIGITS.get(prediction.lower(), prediction)).strip()
    options = [option.strip() for option in _OPTION.findall(question)]
    if options and (found := re.search("|".join(map(re.escape, options)), text)):
        last = len(options) - 1 - options[::-1].index(found[0])
        text = chr(ord("A") + last)
    return text


def parse_0_7(prediction: str, reference: str) -> str | None:
    """Returns the answer as 0.7.3 compares it with the reference in upper case, A to D, or else in lower case."""
    if reference.strip().upper() in ("A", "B", "C", "D"):
        return letters.extract(prediction, "ABCD")
    return prediction.lower().strip().rstrip(".")
