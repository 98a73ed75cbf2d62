"""The verdict on a step, held against a plain-Python reference and against literals."""

import collections
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvlm_jax import guard

RULE = guard.Rule(factor=10.0, least=1.0, skip=True)
judge = jax.jit(guard.judge, static_argnums=0)


def judged(norms, rule=RULE, loss=1.0, stats=()):
    """The verdicts on steps with these gradient norms, one after another."""
    state, found = guard.begin(), []
    for norm in norms:
        state, verdict = judge(rule, state, jnp.float32(loss), jnp.float32(norm), stats)
        found.append(verdict)
    return found


def whys(*args, **kwargs):
    return [int(verdict.why) for verdict in judged(*args, **kwargs)]


def reference(norms, factor=10.0, least=1.0, window=128, enough=16):
    """(what is wrong, median before, skipped, in a row) of each step."""
    kept, skipped, in_a_row = collections.deque(maxlen=window), 0, 0
    for norm in norms:
        median = statistics.median_low(kept) if kept else 0.0
        why = guard.FINE
        if not math.isfinite(norm):
            why = guard.GRADIENT
        elif len(kept) >= enough and norm > max(least, factor * median):
            why = guard.SPIKE
        if why == guard.FINE:
            kept.extend([norm] if norm > 0 else [])
        skipped, in_a_row = (skipped + 1, in_a_row + 1) if why else (skipped, 0)
        yield why, median, skipped, in_a_row


def test_verdicts_are_those_of_a_plain_loop_over_a_long_run():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 0.7, 400)) * np.linspace(30, 1, 400)
    for step in (3, 40, 41, 42, 90, 200, 350):
        norms[step] *= 100
    norms[[0, 5, 60, 61, 250]] = np.nan
    norms[[62, 251]] = np.inf
    norms[[7, 100]] = 0
    norms = norms.astype(np.float32).tolist()
    expected = list(reference(norms))
    assert {why for why, *_ in expected} == {guard.FINE, guard.GRADIENT, guard.SPIKE}
    found = [(int(v.why), float(v.median), int(v.skipped), int(v.in_a_row)) for v in judged(norms)]
    assert found == expected


def test_a_nan_hides_no_good_step():
    """A window of norms that keeps the NaN, as others do, would call the steps behind it bad too."""
    assert whys([2.0] * 20 + [math.nan] + [2.0] * 5) == [guard.FINE] * 20 + [guard.GRADIENT] + [guard.FINE] * 5


def test_a_spike_is_more_than_the_factor_times_the_median_once_there_are_enough_norms():
    assert whys([2.0] * 15 + [21.0]) == [guard.FINE] * 16
    assert whys([2.0] * 16 + [21.0]) == [guard.FINE] * 16 + [guard.SPIKE]
    assert whys([2.0] * 16 + [20.0]) == [guard.FINE] * 17
    assert whys([2.0] * 16 + [1e30], guard.Rule(math.inf, 1.0, True)) == [guard.FINE] * 17


def test_a_gradient_that_is_not_clipped_is_no_spike_however_small_the_others_are():
    assert whys([1e-3] * 20 + [1.0]) == [guard.FINE] * 21
    assert whys([1e-3] * 20 + [1.1]) == [guard.FINE] * 20 + [guard.SPIKE]


@pytest.mark.parametrize(
    "loss, norm, stats, why",
    [
        (math.nan, 1.0, {}, guard.LOSS),
        (-math.inf, math.nan, {}, guard.LOSS),
        (1.0, math.inf, {}, guard.GRADIENT),
        (1.0, 1.0, {"mean": np.array([0.0, np.nan]), "var": np.ones(2)}, guard.STATISTICS),
        (1.0, 1.0, {"mean": np.zeros(2), "var": np.array([1.0, np.inf])}, guard.STATISTICS),
        (1.0, 1.0, {"mean": np.zeros(2), "var": np.ones(2)}, guard.FINE),
    ],
)
def test_what_is_not_finite_is_named(loss, norm, stats, why):
    assert whys([norm], loss=loss, stats=stats) == [why]


def test_a_step_that_is_only_told_of_is_not_counted_as_skipped():
    verdicts = judged([1.0, math.nan, math.nan, 1.0], guard.Rule(10.0, 1.0, skip=False))
    assert [int(v.skipped) for v in verdicts] == [0] * 4
    assert [int(v.in_a_row) for v in verdicts] == [0, 1, 2, 0]
