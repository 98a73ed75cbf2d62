"""A tolerant reader of option letters: "The answer is (B)." is B.

Source: lmms-eval 0.7.3, `extract_mcq_answer` in tasks/_task_utils/mcq_extract.py, which RealWorldQA and the static
MMBench use. Every letter that stands in one of the forms below is a candidate; the surest form wins, and of candidates
of one form the last. If there is no candidate, the last letter anywhere counts, even within a word.
"""

from collections.abc import Sequence

RULE = "the option's letter in its surest place: at the start, at the end, behind 'the answer is', (B), B., B:, B)"
_SIGNS = ",.!?;:'\""  # taken from both ends, in this order
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START, _END, _BEHIND_PHRASE, _ANYWHERE = 10, 9, 7, 0
_PHRASES = (
    "the answer is", "the correct answer is", "the best answer is", "the correct option is", "the best option is",
    "the choice is", "the correct choice is", "answer is", "correct answer is", "best answer is", "correct option is",
    "best option is", "choice is", "correct choice is",
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def extract(prediction: str, letters: Sequence[str]) -> str | None:
    """Returns the letter, one of the capital `letters`, that the prediction names; None if it names none."""
    text = prediction.strip()
    for sign in _SIGNS:
        text = text.strip(sign)
    bare, text = text.strip(), f" {text} "
    found = [
        (sure, text.rfind(form.format(letter)), letter)
        for form, sure in _FORMS
        for letter in letters
        if form.format(letter) in text
    ]
    for start in _behind_phrases(text.lower()):
        found += [(_BEHIND_PHRASE, at, letter) for letter in letters if (at := text.find(letter, start)) >= 0]
    found += [(_START, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    found += [(_END, 0, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    found = found or [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


def _behind_phrases(text: str) -> list[int]:
    return [text.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in text]
