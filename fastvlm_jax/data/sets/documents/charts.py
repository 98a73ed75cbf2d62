"""Draws bar and line charts with matplotlib, each value beside its bar or point, and asks about them."""

import math
import random
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from PIL import Image

from fastvlm_jax.data.sets.documents.canvas import Color, Placed, check
from fastvlm_jax.data.sets.documents.data_sets import DataSet, read_data_sets
from fastvlm_jax.data.sets.documents.fonts import drawing, open_font, path_of
from fastvlm_jax.data.sets.documents.look import Look, smaller
from fastvlm_jax.data.sets.documents.page import Page, Question

STYLES = ("bars", "horizontal bars", "line")
_FEWEST, _MOST = 3, 7  # bars or points
_DPI = 100
_LETTERS = "ABCDEFG"  # labels of rows that have none, or the same twice


class Chart(NamedTuple):
    """Holds what a chart shows: its title, and the label and the value of each bar or point, as they are printed."""

    title: str
    labels: tuple[str, ...]
    values: tuple[str, ...]


def draw(rng: random.Random, split: str, look: Look) -> Page:
    """Returns a page with a chart of real numbers of a split.

    Raises:
      NoRoom: its texts do not fit.
    """
    source = rng.choice(read_data_sets(split))
    chart = choose(rng, source)
    style = "line" if "-" in "".join(chart.values) else rng.choice(STYLES)  # no bars below zero
    font, size = rng.choice(drawing("".join((chart.title, *chart.labels, *chart.values)))), look.font_size
    while not _may_fit(chart, style, font, size, look):
        size = smaller(size)
    while True:
        try:
            picture, lines = _drawn(chart, style, font, size, look)
            break
        except ValueError:  # texts that touch each other or leave the page
            size = smaller(size)
    return Page("chart", picture, lines, size, source.name, questions(rng, chart))


def choose(rng: random.Random, source: DataSet) -> Chart:
    """Returns a random part of a column of a data set: rows that follow each other."""
    title = rng.choice(list(source.columns))
    count = rng.randint(_FEWEST, _MOST)
    first = rng.randrange(source.rows - count + 1)
    labels = source.labels[first : first + count] if source.labels else tuple(_LETTERS[:count])
    values = source.columns[title][first : first + count]
    if len(set(labels)) < count:
        labels = tuple(_LETTERS[:count])
    return Chart(title, labels, values)


def _may_fit(chart: Chart, style: str, font: str, size: int, look: Look) -> bool:
    """Returns whether there is room for the texts; measuring them is faster than a drawing that fails."""
    width = open_font(font, size).getlength
    wide = max(map(width, chart.labels)), max(map(width, chart.values))
    count = len(chart.values)
    if width(chart.title) > look.room[0]:
        return False
    if style == "horizontal bars":
        return sum(wide) + 2 * size <= 0.7 * look.room[0] and count * 1.2 * size <= look.room[1] - 2 * size
    return max(wide) + 2 <= look.room[0] / count and 9 * size <= look.room[1]


def _drawn(
    chart: Chart, style: str, font: str, size: int, look: Look
) -> tuple[Image.Image, tuple[tuple[Placed, ...], ...]]:
    """Returns the picture of a chart, and its texts in reading order.

    Raises:
      ValueError: a text touches another or leaves the page.
    """
    with matplotlib.style.context("default"):  # not what the user's matplotlibrc says
        figure = Figure([side / _DPI for side in look.size], dpi=_DPI, facecolor=_color(look.paper))
        canvas = FigureCanvasAgg(figure)
        written = {
            "fontproperties": FontProperties(fname=path_of(font), size=size * 72 / _DPI),
            "color": _color(look.ink),
            "parse_math": False,  # a dollar sign is one
        }
        artists = _horizontal if style == "horizontal bars" else _vertical
        labels, values = artists(figure, chart, style, font, size, look, written)
        at = (0.5, 1 - (look.margin + size) / look.size[1])
        title = figure.text(*at, chart.title, ha="center", va="baseline", **written)
        canvas.draw()
        placed: list[Placed] = []
        for text in (title, *labels, *values):
            left, bottom, right, top = text.get_window_extent().extents
            box = (math.floor(left), math.floor(look.size[1] - top), math.ceil(right), math.ceil(look.size[1] - bottom))
            found = Placed(text.get_text(), box)
            check(found, placed, look.size)
            placed.append(found)
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    rows = zip(placed[1 : 1 + len(labels)], placed[1 + len(labels) :], strict=True)
    return picture, ((placed[0],), *rows)


def _vertical(
    figure: Figure, chart: Chart, style: str, font: str, size: int, look: Look, written: dict[str, Any]
) -> tuple[list[Text], list[Text]]:
    """Draws bars or a line above their labels; returns the labels and the values."""
    numbers, places = [float(value) for value in chart.values], range(len(chart.values))
    axes = _axes(figure, look, (look.margin, look.margin + 2 * size, look.room[0], look.room[1] - 4 * size))
    if style == "line":
        axes.plot(places, numbers, "o-", color=_color(look.faint))
        axes.set_xlim(-0.5, len(places) - 0.5)
        free = 2 * size / (look.room[1] - 4 * size)  # part of the height above the highest point, and below
        axes.margins(y=free / (1 - 2 * free))
        sides = [_free_side(numbers, place, size) for place in places]
    else:
        axes.bar(places, numbers, color=_color(look.faint))
        axes.set_ylim(bottom=0)
        sides = [("center", size // 2)] * len(places)
    beside = {"textcoords": "offset pixels", "va": "baseline", **written}
    values = [
        axes.annotate(text, (place, number), (0, up), ha=align, **beside)
        for place, number, text, (align, up) in zip(places, numbers, chart.values, sides, strict=True)
    ]
    beside["ha"] = "center"
    labels = [
        axes.annotate(text, (place, 0), (0, -3 * size // 2), xycoords=("data", "axes fraction"), **beside)
        for place, text in zip(places, chart.labels, strict=True)
    ]
    return labels, values


def _free_side(numbers: list[float], place: int, size: int) -> tuple[str, int]:
    """Returns where a value stands that the line does not cross: its alignment, and pixels from its point upwards."""
    beside = numbers[max(place - 1, 0) : place + 2]
    if numbers[place] == max(beside):
        return "center", size // 2
    if numbers[place] == min(beside):
        return "center", -3 * size // 2
    return ("right" if beside[0] < beside[-1] else "left"), size // 2


def _horizontal(
    figure: Figure, chart: Chart, style: str, font: str, size: int, look: Look, written: dict[str, Any]
) -> tuple[list[Text], list[Text]]:
    """Draws bars at the right of their labels, from top to bottom; returns the labels and the values."""
    numbers, places = [float(value) for value in chart.values], range(0, -len(chart.values), -1)
    opened = open_font(font, size)
    left, right = (int(max(map(opened.getlength, texts))) + size for texts in (chart.labels, chart.values))
    box = (look.margin + left, look.margin, look.room[0] - left - right, look.room[1] - 2 * size)
    axes = _axes(figure, look, box)
    axes.barh(places, numbers, color=_color(look.faint))
    axes.set_xlim(left=0)
    beside = {"textcoords": "offset pixels", "va": "center_baseline", **written}
    values = [
        axes.annotate(text, (number, place), (size // 2, 0), ha="left", **beside)
        for place, number, text in zip(places, numbers, chart.values, strict=True)
    ]
    labels = [
        axes.annotate(text, (0, place), (-size // 2, 0), xycoords=("axes fraction", "data"), ha="right", **beside)
        for place, text in zip(places, chart.labels, strict=True)
    ]
    return labels, values


def _axes(figure: Figure, look: Look, box: tuple[int, int, int, int]) -> Axes:
    """Returns axes without numbers in a box (left, bottom, width, height), pixels from the lower left corner."""
    axes = figure.add_axes([part / side for part, side in zip(box, look.size * 2, strict=True)], facecolor="none")
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_color(look.ink))
    return axes


def _color(color: Color) -> tuple[float, ...]:
    """Returns a color as matplotlib takes it, parts of 1."""
    return tuple(part / 255 for part in color)


def questions(rng: random.Random, chart: Chart) -> tuple[Question, ...]:
    """Returns a question of each kind about a chart."""
    numbers = [float(value) for value in chart.values]
    one, other = rng.sample(range(len(numbers)), 2)
    asked = [
        Question("cell", f"What is the value of {chart.labels[one]}?", chart.values[one]),
        Question("count", "How many values are shown?", str(len(numbers))),
    ]
    if numbers.count(max(numbers)) == 1:
        largest = chart.labels[numbers.index(max(numbers))]
        asked.append(Question("largest", "What has the largest value?", largest))
    if numbers[one] != numbers[other]:
        text = f"Is the value of {chart.labels[one]} larger than that of {chart.labels[other]}?"
        asked.append(Question("yes/no", text, "yes" if numbers[one] > numbers[other] else "no"))
    return tuple(asked)
