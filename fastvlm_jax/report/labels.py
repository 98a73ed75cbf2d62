"""Writes labels beside the points of a drawing, where they cover neither each other nor a point or a staircase."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import pts_to_poststep
from matplotlib.lines import Line2D

FONT = 8.0  # points
# Directions from a point to its label, the best first: (horizontal, vertical).
_SIDES = ((1, -1), (1, 1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1), (1, -2), (1, 2), (-1, 2), (-1, -2))
Box = tuple[float, float, float, float]  # left, bottom, right, top


def place_labels(axis: Axes, labels: Sequence[tuple[float, float, str, str, float]]) -> None:
    """Writes each label at the side of its point where it covers least; the axis needs its limits and lines.

    Args:
      labels: (x, y, text, colour, area of the marker in points²).
    """
    scale = 72 / axis.figure.dpi
    corners = axis.transAxes.transform([(0, 0), (1, 1)]).ravel() * scale
    places = [axis.transData.transform((x, y)) * scale for x, y, *_ in labels]
    taken: list[Box] = [box for line in axis.lines for box in _stairs(line, scale)]
    for (x, y), (*_, area) in zip(places, labels, strict=True):
        radius = 0.5 * area**0.5
        taken.append((x - radius, y - radius, x + radius, y + radius))
    for (x, y), (data_x, data_y, text, colour, area) in zip(places, labels, strict=True):
        wide, high, gap = 0.56 * FONT * len(text), 1.1 * FONT, 0.5 * area**0.5 + 2
        found = []
        for rank, (across, up) in enumerate(_SIDES):
            left = x + across * gap * 0.7 - (wide if across < 0 else wide / 2 if across == 0 else 0)
            bottom = y + up * gap * (1.0 if across == 0 else 0.7) - (high if up < 0 else high / 2 if up == 0 else 0)
            box = (left, bottom, left + wide, bottom + high)
            outside = box[0] < corners[0] or box[2] > corners[2] or box[1] < corners[1] or box[3] > corners[3]
            found.append((1e4 * outside + sum(_overlap(box, other) for other in taken), rank, box))
        _, _, box = min(found)
        taken.append(box)
        axis.annotate(
            text, (data_x, data_y), (box[0] - x, box[1] - y + 0.2 * FONT), textcoords="offset points", fontsize=FONT,
            color=colour, zorder=5, parse_math=False,
        )  # fmt: skip


def _stairs(line: Line2D, scale: float) -> Iterator[Box]:
    """Yields the treads and risers of a line that is drawn in steps as boxes, a point wide; of others nothing."""
    if line.get_drawstyle() != "steps-post":
        return
    corners = np.stack(pts_to_poststep(*line.get_xydata().T), axis=1)
    for (x, y), (next_x, next_y) in itertools.pairwise(line.get_transform().transform(corners) * scale):
        yield min(x, next_x) - 0.5, min(y, next_y) - 0.5, max(x, next_x) + 0.5, max(y, next_y) + 0.5


def _overlap(a: Box, b: Box) -> float:
    """Returns the area that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
