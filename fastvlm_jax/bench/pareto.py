"""Finds the Pareto front of accuracy against cost, and reads by it how many times faster one set of models is.

A front is a staircase: between two models that were trained there is none, so nothing is ever interpolated. At a given
accuracy it costs what the cheapest model costs that reaches this accuracy.

    accuracy
       56 |              +-----o 167 ms
       54 |        o-----+ 96 ms
       52 |  o-----+ 50 ms
          +------------------------ cost         at 55 % one pays 167 ms
"""

from collections.abc import Sequence

import numpy as np


def front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Returns the indices of the points on the Pareto front, in order of cost.

    A point stays if and only if no other one has a cost as low and a value as high, one of them strictly better. So
    points that are equal in both stay together, in the order of their indices, or go together.

    Args:
      costs: what each point costs, the lower the better; any unit.
      values: what it brings, the higher the better.

    Raises:
      ValueError: the lengths differ, or a figure is not finite.
    """
    costs, values = _arrays(costs, values)
    if not costs.size:
        return []
    order = np.lexsort((-values, costs))  # by cost, the best value first among equal costs
    costs, values = costs[order], values[order]
    first = np.append(True, (costs[1:] != costs[:-1]) | (values[1:] != values[:-1]))  # of the points equal to it
    best_before = np.append(-np.inf, np.maximum.accumulate(values)[:-1])
    stays = (values > best_before)[first]
    return order[stays[np.cumsum(first) - 1]].tolist()


def cheapest(costs: Sequence[float], values: Sequence[float], value: float) -> int | None:
    """Returns the index of the cheapest point with at least `value`, where the front's step stands; None without one.

    Of equally cheap points it is the one with the highest value, and of equal ones the first.
    """
    for i in front(costs, values):
        if values[i] >= value:
            return i
    return None


def times_faster(
    a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]], value: float
) -> tuple[float, int, int] | None:
    """Returns how many times faster `a` reaches a value than `b`, by the steps of both fronts.

        a = [(32, 48.4), (167, 55.9)]      b = [(256, 47.3), (536, 55.5)]
        times_faster(a, b, 55.5)  ->  (536 / 167, 1, 1)         FastVLM, Figure 1: 3.2 times
        times_faster(a, b, 55.8)  ->  None                      b never reaches it

    Args:
      a, b: (cost, value) of each point, of the front or of all; costs above 0.
      value: the value that both have to reach; usually one that a point has.

    Returns:
      (cost of b's point / cost of a's point, index of a's point, index of b's point); None if one never reaches it.

    Raises:
      ValueError: a cost is not above 0, or a figure is not finite.
    """
    found = []
    for points in (a, b):
        costs, values = [cost for cost, _ in points], [own for _, own in points]
        if any(cost <= 0 for cost in costs):
            raise ValueError(f"a cost of {min(costs)} is not above 0: no ratio can be taken of it")
        found.append(cheapest(costs, values, value))
    i, j = found
    return None if i is None or j is None else (b[j][0] / a[i][0], i, j)


def _arrays(costs: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    costs, values = np.asarray(costs, np.float64), np.asarray(values, np.float64)
    if costs.ndim != 1 or costs.shape != values.shape:
        raise ValueError(f"{costs.size} costs do not belong to {values.size} values: give one of each for every point")
    if not (np.isfinite(costs).all() and np.isfinite(values).all()):
        raise ValueError("a cost or a value is not finite: leave points out that were not measured")
    return costs, values
