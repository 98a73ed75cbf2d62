"""Characters right, the score of a transcription.

reference "12 7 30"   answer "12 7 30"    1
reference "12 7 30"   answer "12 9 30"    1 - 1/7     one of seven characters is wrong
reference "12 7 30"   answer "12 7"       1 - 3/7     three are missing
reference "12"        answer "12 7 30"    1 - 5/7     five of the answer's seven have no place

A random answer has some points too, since the alignment is the best there is: read a score beside that of the same
model without the page.
"""

from fastvlm_jax.evaluate.scores.anls import distance

RULE = (
    "characters right: 1 - edits / length of the longer text, in the best alignment; case counts, a run of white space "
    "is one space, none at the ends"
)


def score(answer: str, reference: str) -> float:
    """Returns the share of characters that are right, 0 to 1, where an edit inserts, deletes or replaces one."""
    answer, reference = normalise(answer), normalise(reference)
    return 1 - distance(reference, answer) / max(len(reference), len(answer), 1)


def normalise(text: str) -> str:
    """Returns a text as `score` compares it, with one space for each run of white space and none at the ends."""
    return " ".join(text.split())
