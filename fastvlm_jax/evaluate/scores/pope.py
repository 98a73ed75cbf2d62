"""Reads yes or no in an answer on POPE, and counts how often it is right.

answer      "Yes."  "No, there is no cat."  "Yes, but not clearly"  "NO"  ""     "no"
LLaVA       yes     no                      no                      yes   yes    no
lmms-eval   none    none                    none                    no    none   no
"""

from collections.abc import Iterable
from typing import NamedTuple


def llava(answer: str) -> str:
    """Returns "no" if No, no or not is a word of the answer before its first period, else "yes".

    Words are what spaces divide once commas are deleted. Source: eval_pope of LLaVA 2024-05 (llava/eval/eval_pope.py).
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def lmms_eval(answer: str) -> str | None:
    """Returns the answer in lower case if it is "yes" or "no", else None.

    Source: pope_process_results of lmms-eval 0.2.1, 0.2.3 and 0.7.3 (tasks/pope/utils.py).
    """
    answer = answer.lower().strip()
    return answer if answer in ("yes", "no") else None


class Counts(NamedTuple):
    """Counts pairs of what was read in an answer and the label.

    Attributes:
      true_yes, false_yes: read "yes" where the label is yes, and where it is no.
      true_no, false_no: read "no" where the label is no, and where it is yes.
      unread_yes, unread_no: neither was read, by label. They count in the accuracy alone, as lmms-eval has it.
    """

    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0
    unread_yes: int = 0
    unread_no: int = 0

    @property
    def questions(self) -> int:
        """Returns the number of questions."""
        return sum(self)

    @property
    def accuracy(self) -> float:
        """Returns the share of right answers among all."""
        return _share(self.true_yes + self.true_no, self.questions)

    @property
    def precision(self) -> float:
        """Returns the share of "yes" that is right."""
        return _share(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        """Returns the share of "yes" among the answers to questions with the label yes, where one was read."""
        return _share(self.true_yes, self.true_yes + self.false_no)

    @property
    def f1(self) -> float:
        """Returns the harmonic mean of precision and recall; 0 if there is no right "yes"."""
        return _share(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_share(self) -> float:
        """Returns the share of "yes" among the answers."""
        return _share(self.true_yes + self.false_yes, self.questions)

    @property
    def yes_labels(self) -> float:
        """Returns the share of "yes" among the labels, which lmms-eval reports as yes_ratio."""
        return _share(self.true_yes + self.false_no + self.unread_yes, self.questions)


def count(pairs: Iterable[tuple[str | None, str]]) -> Counts:
    """Returns the counts of pairs (what was read in an answer, label)."""
    numbers = dict.fromkeys(Counts._fields, 0)
    for read, label in pairs:
        right = "unread" if read is None else "true" if read == label else "false"
        numbers[f"{right}_{label if read is None else read}"] += 1
    return Counts(**numbers)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
