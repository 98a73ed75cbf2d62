"""Relaxed accuracy of ChartQA: a number may be off by 5 %, any other answer must be the same text.

Source: lmms-eval 0.2.x and 0.7.3, `relaxed_correctness` in tasks/chartqa/utils.py. A number is what Python's `float`
reads, and with a percent sign at its end a hundredth of it. A target of 0 is compared as text.
"""

RULE = "relaxed accuracy: a number within 5 % of a target that is not 0 (x% is x/100), else the same text but for case"


def score(prediction: str, target: str) -> float:
    """Returns 1 if the prediction is right, else 0."""
    found, wanted = number(prediction), number(target)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= 0.05)
    return float(prediction.lower() == target.lower())


def number(text: str) -> float | None:
    """Returns the number that a text is, or None."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
