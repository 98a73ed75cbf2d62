"""Reads the scores in a judge's reply; None where the rule reads none, or one that is not on the judge's scale."""

import re

MOST = 10.0  # best score of an assistant; LLaVA's judge is asked for 1 to 10, and now and then gives 0


def pair(reply: str) -> tuple[float, float] | None:
    """Returns (reference's score, answer's score): the first line is two numbers with a space or a comma between.

    Source: LLaVA 2024-05 llava/eval/eval_gpt_review_bench.py and lmms-eval 0.2.2 llava-in-the-wild/utils.py,
    parse_score, which give (-1, -1) for None and let it into the means. "8, 6", with both signs, is read as None.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    return _on_scale(parts) if len(parts) == 2 else None


def first_pair(reply: str) -> tuple[float, float] | None:
    """Returns (reference's score, answer's score): the first two numbers of the first line, whatever stands around.

    Source: lmms-eval 0.7.3 tasks/llava-in-the-wild/utils.py, _parse_comparative_scores, which gives (-1, -1) for None.
    """
    line = reply.strip().split("\n")[0]
    return _on_scale(re.findall(r"-?\d+(?:\.\d+)?", line.replace(",", " ").replace(";", " "))[:2])


def share(reply: str) -> float | None:
    """Returns the score from 0 to 1 before the first space.

    Source: lmms-eval 0.2.2 and 0.7.3 tasks/mmvet/utils.py, mmvet_process_results, which asks again at a higher
    temperature for None, and in the end gives 0.
    """
    try:
        score = float(reply.strip().split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def _on_scale(parts: list[str]) -> tuple[float, float] | None:
    try:
        reference, answer = map(float, parts)
    except ValueError:
        return None
    return (reference, answer) if 0 <= reference <= MOST and 0 <= answer <= MOST else None
