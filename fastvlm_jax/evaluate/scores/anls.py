"""ANLS, the average normalised Levenshtein similarity of DocVQA and InfoVQA.

Source: lmms-eval 0.2.1 and 0.7.3, `anls` in api/metrics.py; 0.2.3 registers no metric of that name. Lengths are those
of the texts as they are, so that white space counts in them though not in the distance. A similarity below 0.5 is 0.
"""

from collections.abc import Sequence

THRESHOLD = 0.5
RULE = (
    "ANLS: lower case, one space for each run of white space; 1 - edits / length of the longer text, best reference, "
    "below 0.5 it is 0"
)
RULE_0_2 = f"1 if its ANLS is 0.5 or more, else 0, as lmms-eval before 0.3 makes of it; {RULE}"


def score(prediction: str, references: Sequence[str]) -> float:
    """Returns the similarity to the nearest reference, 0 or 0.5 to 1."""
    answer = normalise(prediction)
    shares = []
    for reference in references:
        length = max(len(reference.upper()), len(prediction.upper()))  # "ß" counts two
        shares.append(distance(normalise(reference), answer) / length if length else 0.0)
    similarity = 1 - min(shares)
    return similarity if similarity >= THRESHOLD else 0.0


def score_0_2(prediction: str, references: Sequence[str]) -> float:
    """Returns 1 if the similarity to a reference is 0.5 or more, else 0: what lmms-eval 0.2.x takes the mean of.

    Source: ConfigurableTask.process_results in api/task.py of 0.2.1, 0.2.2 and 0.2.3, for tasks with several targets:
    it asks `anls` about each reference alone, and gives 1 if any of the results is not 0. Mended in 0.3.0.
    """
    return float(score(prediction, references) > 0)


def normalise(text: str) -> str:
    """Returns a text in lower case, with one space for each run of white space and none at the ends."""
    return " ".join(text.strip().lower().split())


def distance(one: str, other: str) -> int:
    """Returns the Levenshtein distance: the least number of characters inserted, deleted or replaced."""
    row = list(range(len(one) + 1))
    for i, right in enumerate(other, 1):
        above, beside, row[0] = i - 1, i, i  # row[k], and the new row[k]
        for k, left in enumerate(one, 1):
            beside = above if left == right else 1 + min(above, row[k], beside)
            above, row[k] = row[k], beside
    return row[-1]
