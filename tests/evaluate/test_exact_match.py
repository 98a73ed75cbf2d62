"""The one comparison rule, against answers judged by hand."""

import pytest

from fastvlm_jax.evaluate.exact_match import identical, matches


@pytest.mark.parametrize(
    "answer, truth, right, exact",
    [
        ("red", "red", True, True),
        ("red", "red\n", True, True),  # a data set's line break
        ("Red.", "red", True, False),
        ("two  red\tcars", "Two red cars .", True, False),
        ("STRASSE", "Straße", True, False),
        ("caf\u0065\u0301", "caf\u00e9", True, False),  # e and an accent, or one letter
        ("red", "dark red", False, False),
        ("10", "1.0", False, False),
        ("a red car", "red car", False, False),
        ("1.5..", "1.5.", False, False),  # one full stop only
        ("", "red", False, False),
        ("", ".", True, False),
    ],
)
def test_an_answer_is_right_or_wrong(answer, truth, right, exact):
    assert (matches(answer, truth), matches(truth, answer)) == (right, right)
    assert identical(answer, truth) == exact
