"""Says how many times faster one encoder of a sweep is than another at equal accuracy, with the points that show it."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from fastvlm_jax.bench.page import milliseconds
from fastvlm_jax.bench.pareto import times_faster
from fastvlm_jax.report.sweep_figures import Cost, encoder_of, series_of
from fastvlm_jax.report.sweep_results import Point


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares the cheapest points of two series that reach an accuracy.

    Attributes:
      accuracy: what both reach, percent.
      times: cost of the slow point over that of the fast one, 1 or more.
      fast, slow: (name of the series, its point, its cost) on both sides.
    """

    accuracy: float
    times: float
    fast: tuple[str, Point, float]
    slow: tuple[str, Point, float]

    def sentence(self, cost: str) -> str:
        """Returns it in words: "FastViTHD (x-1024: 55.9 ± 0.1 % in 167 ms) is 3.21 times faster than ... at 55.5 %".

        Args:
          cost: name of the cost, and whether it was measured or estimated.
        """
        (fast, *_), (slow, *_) = self.fast, self.slow
        than = f"is {self.times:.3g} times faster than" if self.times > 1 else "is as fast as"
        return (
            f"{fast} {_shown(self.fast)} {than} {slow} {_shown(self.slow)} at {self.accuracy:.1f} % or more, by {cost}"
        )


def compare(points: Sequence[Point], cost: Cost, by: Callable[[Point], str] = encoder_of) -> list[list[Comparison]]:
    """Returns for each pair of series their comparisons, the highest accuracy that both reach first.

    They stand at each accuracy of a point of the two that both reach, read by the steps of both fronts: nothing is
    interpolated. Where the same two points answer for several accuracies, the highest stands for them.
    """
    pairs = []
    for (a, points_a), (b, points_b) in itertools.combinations(series_of(points, cost, by).items(), 2):
        found: dict[tuple[int, int], Comparison] = {}
        for value in sorted({accuracy for _, accuracy, _ in (*points_a, *points_b)}, reverse=True):
            read = times_faster([own[:2] for own in points_a], [own[:2] for own in points_b], value)
            if read is None or read[1:] in found:
                continue
            times, i, j = read
            sides = (a, points_a[i][2], points_a[i][0]), (b, points_b[j][2], points_b[j][0])
            fast, slow = sides if times >= 1 else sides[::-1]
            found[i, j] = Comparison(value, max(times, 1 / times), fast, slow)
        pairs.append(list(found.values()))
    return [pair for pair in pairs if pair]


def _shown(side: tuple[str, Point, float]) -> str:
    _, point, cost = side
    error = "" if point.mean_standard_error is None else f" ± {point.mean_standard_error:.2g}"
    return f"({point.name}: {point.mean:.1f}{error} % in {milliseconds(cost / 1000)} ms)"
