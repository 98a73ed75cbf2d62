"""Characters right, by hand and against the recursive definition of an edit distance."""

import functools
import random

import pytest

from fastvlm_jax.evaluate.scores.characters import normalise, score


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("12 7 30", "12 7 30", 1),
        ("12 9 30", "12 7 30", 6 / 7),  # one digit is another
        ("12 7", "12 7 30", 4 / 7),  # " 30" is missing
        ("12 7 30", "12", 2 / 7),  # five characters too many
        ("2 7 30", "12 7 30", 6 / 7),  # the alignment is the best: a lost first digit shifts nothing
        ("21", "12", 0),
        ("ab", "ba", 0),
        ("abc", "bca", 1 / 3),  # "bc" stays, an "a" is inserted and one deleted
        ("", "12", 0),
        ("a\\n\\n b ", " a b", 1),
        ("Total", "total", 4 / 5),
        ("", "", 1),
    ],
)
def test_characters_by_hand(answer, reference, right):
    answer = answer.replace("\\n", "\n")
    assert score(answer, reference) == pytest.approx(right)


def test_any_two_texts_against_the_recursive_definition():
    def edits(one: str, other: str) -> int:
        @functools.cache
        def best(i: int, k: int) -> int:
            if not i or not k:
                return i + k
            return min(best(i - 1, k) + 1, best(i, k - 1) + 1, best(i - 1, k - 1) + (one[i - 1] != other[k - 1]))

        return best(len(one), len(other))

    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("12 \n", k=rng.randrange(9))) for _ in range(2))
        a, b = " ".join(one.split()), " ".join(other.split())
        assert (normalise(one), normalise(other)) == (a, b)
        assert score(one, other) == pytest.approx(1 - edits(a, b) / max(len(a), len(b), 1))
