"""What is read in a judge's reply, against LLaVA's and lmms-eval's functions on generated replies."""

import numpy as np
import pytest
from harness import LLAVA, ask

from fastvlm_jax.evaluate.scores.judge_replies import first_pair, pair, share

PARTS = (
    *"0123456789", "10", "8.5", "7.25", "-1", "11", "1e1", "1_0", "nan", "inf", ".5", "5.", "0.3", "1.0", "1.1",
    *"   ", "  ", ",", ", ", ";", "\t", "\n", "\r\n", "/10", "Assistant 1:", "Scores:", "**", "(", ")", "eight", "٣",
    "-", "", "\u00a0", "8 6\nThe first", "Correctness: ", "\n\n",
)  # fmt: skip


def replies(count: int = 10_000) -> list[str]:
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(PARTS, rng.integers(0, 7))) for _ in range(count)]
    return [*made, "8 6", "8 6\nBoth", "8, 6", "8,6", "8 6 ", " 8 6", "x" * 100_000, "7" * 5000 + " 1"]


@pytest.mark.parametrize(
    ("version", "module", "call", "rule"),
    [
        (LLAVA, "llava.eval.eval_gpt_review_bench", "module.parse_score(reply)", pair),
        ("lmms-eval-0.2.3", "lmms_eval.tasks.llava-in-the-wild.utils", "module.parse_score(reply)", pair),
        (
            "lmms-eval-0.7.3",
            "lmms_eval.tasks.llava-in-the-wild.utils",
            "module._parse_comparative_scores(reply).metadata['scores']",
            first_pair,
        ),
    ],
)
def test_two_scores_are_read_as_the_harness_reads_them(version, module, call, rule):
    code = f"""
import importlib, math
module = importlib.import_module({module!r})
def main(replies):
    module.print = lambda *_: None
    pairs = [{call} for reply in replies]
    return [[x if math.isfinite(x) else -1 for x in pair] for pair in pairs]
"""
    found = replies()
    expected = ask(version, code, found)
    for reply, scores in zip(found, expected, strict=True):
        on_scale = all(0 <= score <= 10 for score in scores)  # theirs lets in any number
        assert rule(reply) == (tuple(scores) if on_scale else None), reply
    assert sum(min(scores) >= 0 for scores in expected) > 200


def test_a_grade_is_read_as_lmms_eval_reads_it():
    code = """
import importlib
utils = importlib.import_module("lmms_eval.tasks.mmvet.utils")
class Again(Exception): pass
def main(replies):
    utils.time = Anything()
    grades = []
    for reply in replies:
        asked = []
        def judge(prompt, temperature=0.0):
            asked.append(temperature)
            if len(asked) > 12: raise Again  # it would ask for ever: a number that is no grade
            return reply.strip(), "judge"
        utils.get_chat_response = judge
        doc = {"question": "q", "answer": "a", "question_id": "v1_0", "capability": "rec"}
        try:
            score = utils.mmvet_process_results(doc, ["p"])["gpt_eval_score"]["score"]
        except Again:
            score = None
        grades.append(score if len(asked) == 1 and reply.strip() else None)  # else it asked again, or gave up with 0
    return grades
"""
    found = [*replies(), "0.5", "1", "0.5 because", "1.0\n", "0.5\n\nbecause", "0,5", "2"]
    expected = ask("lmms-eval-0.7.3", code, found)
    assert [share(reply) for reply in found] == expected
    assert sum(grade is not None for grade in expected) > 200


@pytest.mark.parametrize(
    ("reply", "llava", "lmms_eval"),
    [
        ("8 6\nAssistant 1 is better.", (8, 6), (8, 6)),
        ("8,6", (8, 6), (8, 6)),
        ("8, 6", None, (8, 6)),  # the comma becomes a second space
        ("8;6", None, (8, 6)),
        ("\n8 6", None, (8, 6)),
        ("Assistant 1: 8, Assistant 2: 6", None, (1, 8)),  # the first two numbers of the line
        ("85 90", None, None),
        ("nan 5", None, None),
        ("-1 -1", None, None),
        ("", None, None),
    ],
)
def test_the_harnesses_differ_in_the_replies_that_they_read(reply, llava, lmms_eval):
    assert (pair(reply), first_pair(reply)) == (llava, lmms_eval)
