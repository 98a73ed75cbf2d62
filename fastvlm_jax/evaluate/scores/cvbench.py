"""Reads the letter of an option in answers to CV-Bench, and takes the mean of its sources.

answer        letter        answer                letter
"(B)" "b"     B             "The answer is (B)"   T
"B. two"      B             "[B]"                 -
"""

import re
from collections.abc import Sequence

_LETTER = re.compile(r"[(\s]*([A-Z])", re.IGNORECASE)
SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}


def read(answer: str) -> str | None:
    """Returns the first letter of the answer, as a capital, which only brackets and white space may precede.

    It need not be the letter of an option.

    Source: lmms-eval 0.7.3, tasks/cv_bench/utils.py, _extract_answer_letter.
    """
    found = _LETTER.match(answer.strip())
    return found[1].upper() if found else None


def mean_by_source(scores: Sequence[float], sources: Sequence[str]) -> float | None:
    """Returns the official mean: of 2D, the mean of ADE20K and COCO; of 3D, Omni3D; of both, the mean of the two.

    Source: lmms-eval 0.7.3, tasks/cv_bench/utils.py, cv_bench_default_aggregate_results, which no task of it uses.

    Args:
      scores: score of each row.
      sources: source of each row. One that no row has does not count.

    Returns:
      The mean; None if there are no rows of these sources.
    """
    parts = []
    for names in SOURCES.values():
        found = [[score for score, source in zip(scores, sources, strict=True) if source == name] for name in names]
        if means := [sum(part) / len(part) for part in found if part]:
            parts.append(sum(means) / len(means))
    return sum(parts) / len(parts) if parts else None
