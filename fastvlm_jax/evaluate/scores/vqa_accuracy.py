"""Scores a short answer against the answers of several people, as VQA and TextVQA do: 3 who agree make it right.

Each reference is left out in turn; an answer then counts min(1, matches among the others / 3); the score is the mean.
Of 10 references, 0, 1, 2, 3, 4 that match give 0, 0.3, 0.6, 0.9, 1. The rules differ in how they normalise first.
"""

from collections.abc import Sequence

from fastvlm_jax.evaluate.scores.evalai import normalise, normalise_lightly, one_line, signs_and_words


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the score of an answer, 0 to 1; both sides are normalised already."""
    matches, count = list(references).count(answer), len(references)
    left_out_matching = min(3, matches - 1) * matches
    left_out_others = min(3, matches) * (count - matches)
    return (left_out_matching + left_out_others) / (3 * count) if matches else 0.0


def textvqa(prediction: str, references: Sequence[str]) -> float:
    """Returns the score by the rule of TextVQA: all steps of the normaliser on both sides.

    Source: TextVQAAccuracyEvaluator of LLaVA 2024-05 (llava/eval/m4c_evaluator.py); textvqa_process_results of
    lmms-eval 0.2.1, 0.2.3 and 0.7.3.
    """
    return soft_accuracy(normalise(prediction), [normalise(reference) for reference in references])


def vqav2_official(prediction: str, references: Sequence[str]) -> float:
    """Returns the score by VQAv2's own rule: steps 5 to 8 on both sides, unless all references are the same text.

    Source: the evaluation code of VQA (vqaEval.py), as big_vision has it too.
    """
    prediction, references = one_line(prediction), [one_line(reference) for reference in references]
    if len(set(references)) > 1:
        prediction, references = signs_and_words(prediction), [signs_and_words(text) for text in references]
    return soft_accuracy(prediction, references)


def vqav2_lmms_eval_0_2(prediction: str, references: Sequence[str]) -> float:
    """Returns the score by VQAv2's own rule of an answer that was normalised, by all steps, before.

    Where all references are the same text, they are compared as they are: "the dog" is then wrong if all say "the dog".
    Source: vqav2_process_results of lmms-eval 0.2.1 and 0.2.3. LLaVA's submission to VQA's server is scored so too.
    """
    return vqav2_official(normalise(prediction), references)


def vqav2_lmms_eval_0_7(prediction: str, references: Sequence[str]) -> float:
    """Returns the score by steps 4 to 8 on both sides.

    Source: vqav2_process_results of lmms-eval 0.7.3.
    """
    return soft_accuracy(normalise_lightly(prediction), [normalise_lightly(reference) for reference in references])
