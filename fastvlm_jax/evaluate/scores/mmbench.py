"""Reads the letter of an option in answers to MMBench, by rules alone, and counts an item by all of its rotations.

options cat, dog, bird, fish    answer              letter    answer              letter
                                "B" "B." "(B)"      B         "A dog is here"     B   of four words, A is an article
                                "The answer is B"   B         "A cat sits on B"   A   two letters: the one text counts
                                "a dog"             B         "E"                 E   a letter, if of no option
                                "b" "dog or cat"    -         "B or D"            D   two letters, no text: the last
"""

from collections.abc import Mapping

from fastvlm_jax.evaluate.scores import letters

LETTERS = "ABCDE"
ROTATION = 1_000_000  # rows whose index differs by a multiple of it ask the same question with its options turned
# What may stand before and after a letter that is a word of its own.
_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."),
    (":", ")"), (":", ")."),
)  # fmt: skip


def read_static(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter by the strict rules, or else by the tolerant ones; None if neither finds one.

    Source: lmms-eval 0.7.3, tasks/mmbench/mmbench_evals.py, eval_sub_data of the task mmbench_en_dev_static.

    Args:
      options: letter -> text, A to D; lmms-eval takes the "nan" of an option that is not there for a text.
    """
    return read_letter(answer) or read_text(answer, options) or letters.extract(answer, sorted(options))


def read_letter(answer: str) -> str | None:
    """Returns the one letter that is a word of the answer, alone or with signs around it; None if there is not one.

    A letter alone does not count if A is a word of more than three: it may be an article.

    Source: lmms-eval 0.7.3 and 0.2, tasks/mmbench/mmbench_evals.py, can_infer_option.
    """
    words = answer.split()
    if "Failed to obtain answer via API" in answer:
        return None
    for before, after in (("", ""), *_AROUND):
        found = [letter for letter in LETTERS if before + letter + after in words]
        article = not before + after and "A" in words and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    return None


def read_text(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the one option whose text the answer holds, in any case; None if there is not one.

    Source: lmms-eval 0.7.3 and 0.2, tasks/mmbench/mmbench_evals.py, can_infer_text.
    """
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def items_right(right: Mapping[int, bool]) -> dict[int, bool]:
    """Returns for each item whether all of its rows are right: index of the item -> whether.

    Source: lmms-eval 0.7.3, tasks/mmbench/mmbench_evals.py, eval_result. An item has a row with an index below
    1,000,000; its rotations have that index modulo 1,000,000, and count for nothing if it has none.

    Args:
      right: index of a row -> whether its answer is right.
    """
    items = {index: value for index, value in right.items() if index < ROTATION}
    for index, value in right.items():
        if index % ROTATION in items:
            items[index % ROTATION] &= value
    return items
