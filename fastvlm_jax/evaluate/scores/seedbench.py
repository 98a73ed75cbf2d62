"""Reads the letter of an option in answers to SEED-Bench, by the rules of lmms-eval and of LLaVA.

answer, B is right   lmms-eval   LLaVA        answer, B is right   lmms-eval   LLaVA
"B"                  B           B            "Because"            B           -
"b"                  B           -            "(B)"                -           -
"B. cat"             B           -            "Answer: B"          A           -
"""


def read_lmms_eval(answer: str, letters: str) -> str | None:
    """Returns the first sign of the answer, in either case, if it is the letter of an option.

    Source: lmms-eval 0.2.1 to 0.7.3, tasks/seedbench/utils.py, seed_process_result and seed_aggregation_result.
    """
    return next((letter for letter in letters if letter.lower() == answer[:1].lower()), None)


def read_llava(answer: str, letters: str) -> str | None:
    """Returns the answer if it is the letter of an option, in its case, and nothing else.

    Source: LLaVA 2024-05, scripts/convert_seed_for_submission.py.
    """
    return answer if answer in tuple(letters) else None
