"""Scores an answer on GQA as LLaVA does. lmms-eval's rule is `equality.lmms_eval`."""


def prediction_of(answer: str) -> str:
    """Returns what LLaVA hands to GQA's script: lower case, without periods at the end.

    Source: scripts/convert_gqa_for_eval.py of LLaVA 2024-05.
    """
    return answer.rstrip(".").lower()


def llava(prediction: str, reference: str) -> float:
    """Returns 1.0 if the prediction, after `prediction_of`, is the reference, else 0.0.

    Source: LLaVA's script, then the plain equality of GQA's own eval.py.
    """
    return float(prediction_of(prediction) == reference)
