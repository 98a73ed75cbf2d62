"""The Pareto front against its definition, point by point, and ratios at equal accuracy worked out by hand."""

import random

import pytest

from fastvlm_jax.bench.pareto import cheapest, front, times_faster

# Figure 1a of the paper, digitised from its picture: (TTFT in ms, Avg-5 in percent).
FASTVITHD = [(32, 48.4), (50, 52.5), (96, 54.5), (167, 55.9)]
CONVNEXT_L = [(64, 49.0), (120, 52.2), (292, 54.4), (943, 55.3)]
SIGLIP = [(536, 55.5)]


def by_definition(costs, values):
    """A point stays iff no other has cost <= and value >= with one strict; in order of cost, then value, then index."""
    stay = []
    for i, (cost, value) in enumerate(zip(costs, values, strict=True)):
        dominated = False
        for j, (other_cost, other_value) in enumerate(zip(costs, values, strict=True)):
            as_good = other_cost <= cost and other_value >= value
            strict = other_cost < cost or other_value > value
            dominated = dominated or (j != i and as_good and strict)
        if not dominated:
            stay.append(i)
    return sorted(stay, key=lambda i: (costs[i], i))


@pytest.mark.parametrize(
    "points, expected",
    [
        ([], []),
        ([(5, 1)], [0]),
        (FASTVITHD, [0, 1, 2, 3]),
        # Dearer and no better, whatever the order.
        ([(2, 10), (1, 10)], [1]),
        ([(1, 10), (2, 10), (3, 11)], [0, 2]),
        # Equally dear: the better one.
        ([(1, 10), (1, 12), (1, 11)], [1]),
        # Equal points stay together or go together.
        ([(1, 10), (1, 10), (2, 12), (2, 12)], [0, 1, 2, 3]),
        ([(3, 9), (3, 9), (1, 10)], [2]),
        ([(0.0, -1.0), (-0.0, -1.0)], [0, 1]),
        # All of Figure 1a: FastViTHD, and ConvNeXt-L behind it.
        ([*FASTVITHD, *CONVNEXT_L, *SIGLIP], [0, 1, 2, 3]),
    ],
)
def test_front_of_points_worked_out_by_hand(points, expected):
    assert front([cost for cost, _ in points], [value for _, value in points]) == expected


def test_front_is_its_definition_on_random_points_with_many_ties():
    draw, stayed = random.Random(0), 0
    for _ in range(3000):
        number, kinds = draw.randrange(1, 25), draw.choice([2, 3, 6, 1000])
        costs = [draw.randrange(kinds) / 4 for _ in range(number)]
        values = [draw.randrange(kinds) / 4 for _ in range(number)]
        found = front(costs, values)
        assert found == by_definition(costs, values), (costs, values)
        stayed += len({(costs[i], values[i]) for i in found}) < len(found)
    assert stayed > 500  # cases in which equal points stayed together


@pytest.mark.parametrize(
    "a, b, value, expected",
    [
        (FASTVITHD, SIGLIP, 55.5, (536 / 167, 3, 0)),
        (SIGLIP, FASTVITHD, 55.5, (167 / 536, 0, 3)),
        # Between two models the step asks for the better one: 54.4 costs FastViTHD 96 ms, 54.5 too and 54.6 167 ms.
        (FASTVITHD, CONVNEXT_L, 54.4, (292 / 96, 2, 2)),
        (FASTVITHD, CONVNEXT_L, 54.5, (943 / 96, 2, 3)),
        (FASTVITHD, CONVNEXT_L, 54.6, (943 / 167, 3, 3)),
        (FASTVITHD, CONVNEXT_L, 0, (64 / 32, 0, 0)),
        # One of them never gets there.
        (FASTVITHD, CONVNEXT_L, 55.4, None),
        (FASTVITHD, SIGLIP, 56.0, None),
        ([], SIGLIP, 55.0, None),
        # Points behind the front change nothing; of equally dear ones the best stands for both.
        ([(9, 50), (4, 50), (4, 51)], [(8, 50)], 50, (2.0, 2, 0)),
    ],
)
def test_times_faster_reads_the_steps(a, b, value, expected):
    assert times_faster(a, b, value) == expected


def test_times_faster_is_the_ratio_of_the_cheapest_points_that_reach_the_value():
    draw = random.Random(1)
    for _ in range(500):
        a, b = ([(draw.randrange(1, 9), draw.randrange(6)) for _ in range(draw.randrange(1, 9))] for _ in "ab")
        value = draw.choice(a + b)[1]
        costs = [min((cost for cost, own in points if own >= value), default=None) for points in (a, b)]
        found = times_faster(a, b, value)
        assert (found and found[0]) == (None if None in costs else costs[1] / costs[0])
        if found:
            (_, i, j) = found
            assert (a[i][0], b[j][0]) == tuple(costs) and a[i][1] >= value and b[j][1] >= value


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: front([1, 2], [1]), "2 costs do not belong to 1 values"),
        (lambda: front([1, float("nan")], [1, 1]), "is not finite"),
        (lambda: front([1], [float("inf")]), "is not finite"),
        (lambda: cheapest([1], [None], 1), "is not finite"),
        (lambda: times_faster([(0, 1)], [(1, 1)], 1), "a cost of 0 is not above 0"),
    ],
)
def test_figures_that_no_front_can_hold_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
