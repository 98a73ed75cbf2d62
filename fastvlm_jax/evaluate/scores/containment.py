"""Rules of OCRBench: an answer is right if it contains a reference.

Source: lmms-eval 0.2.x and 0.7.3, `ocrbench_process_results` in tasks/ocrbench/utils.py. Formulas, of the data set
HME100k, are compared without spaces and in their case; 0.2.x lowers the prediction's first, but not the reference's.
"""

from collections.abc import Sequence

_RULE = "contains a reference: lower case, a space for a line break; formulas (HME100k) without spaces, in their case"
RULE_0_2 = _RULE.replace("in their case", "the answer in lower case, the reference in its case")
RULE_0_7 = _RULE.replace("lower case", "lower case, full-width letters as plain ones", 1)
# Full-width "!" to "~" and the wide space, as plain ASCII.
_FOLD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def score_0_2(prediction: str, references: Sequence[str], formula: bool) -> float:
    """Returns 1 if the prediction contains a reference by the rule of lmms-eval 0.2.x, else 0."""
    prediction = prediction.lower()
    if formula:
        return float(any(_bare(reference) in _bare(prediction) for reference in references))
    return float(any(_plain(reference) in _plain(prediction) for reference in references))


def score_0_7(prediction: str, references: Sequence[str], formula: bool) -> float:
    """Returns 1 if the prediction contains a reference by the rule of lmms-eval 0.7.3, else 0."""
    if formula:
        return float(any(_bare(reference) in _bare(prediction) for reference in references))
    answer = _plain(prediction.translate(_FOLD))
    return float(any(_plain(reference.translate(_FOLD)) in answer for reference in references))


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _bare(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
