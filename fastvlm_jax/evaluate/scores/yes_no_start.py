"""Rules of MME: yes or no at the start of an answer.

Source: `parse_pred_ans` of lmms-eval 0.2.x and 0.7.3, tasks/mme/utils.py, and that of calculation.py in MME's own
eval_tool, which LLaVA's script runs. Both look anywhere in the first four letters: "Not sure" and "know" are no.
"""

LMMS_EVAL_RULE = "without full stops: yes or no, y or n, or one of both within the first 4 letters; else neither"
MME_RULE = "yes or no within the first 4 letters; else neither"


def parse_lmms_eval(prediction: str) -> str | None:
    """Returns "yes", "no", or None."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return parse_mme(text)


def parse_mme(prediction: str) -> str | None:
    """Returns "yes", "no", or None by the rule of MME's own tool."""
    start = prediction.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None
