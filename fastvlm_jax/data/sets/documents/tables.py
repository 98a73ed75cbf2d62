"""Draws tables of rows that follow each other in a data set, and asks about their cells."""

import random
from typing import NamedTuple

from fastvlm_jax.data.sets.documents.canvas import Canvas, Placed
from fastvlm_jax.data.sets.documents.data_sets import DataSet, read_data_sets
from fastvlm_jax.data.sets.documents.fonts import drawing, open_font
from fastvlm_jax.data.sets.documents.look import Look, smaller
from fastvlm_jax.data.sets.documents.page import Page, Question

_MOST_ROWS, _MOST_COLUMNS = 12, 5
_RULES = ("none", "header", "rows", "grid")


class Table(NamedTuple):
    """Holds the texts of a table.

    Attributes:
      header: name of each column; () without.
      rows: texts of each row.
      labels: number of columns at the left that hold labels, 0 or 1; the others hold numbers.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """Returns the header, if there is one, and the rows."""
        return (self.header, *self.rows) if self.header else self.rows


def draw(rng: random.Random, split: str, look: Look) -> Page:
    """Returns a page with a table of real numbers of a split.

    Raises:
      NoRoom: it does not fit.
    """
    source = rng.choice(read_data_sets(split))
    table = choose(rng, source)
    font, size = rng.choice(drawing("".join(map("".join, table.lines)))), look.font_size
    while (fitted := fit(table, font, size, look)) is None:
        size = smaller(size)
    canvas = Canvas(look.size, look.paper, look.ink)
    lines = _put(rng, canvas, fitted, font, size, look)
    return Page("table", canvas.picture, lines, size, source.name, questions(rng, fitted))


def choose(rng: random.Random, source: DataSet) -> Table:
    """Returns a random part of a data set: rows that follow each other, and some of its columns."""
    count = rng.randint(2, min(_MOST_ROWS, source.rows))
    first = rng.randrange(source.rows - count + 1)
    names = rng.sample(list(source.columns), rng.randint(1, min(_MOST_COLUMNS, len(source.columns))))
    columns = [source.columns[name][first : first + count] for name in names]
    labels = int(bool(source.labels) and rng.random() < 0.7)
    if labels:
        names, columns = [source.label, *names], [source.labels[first : first + count], *columns]
    header = tuple(names) if rng.random() < 0.8 else ()
    return Table(header, tuple(zip(*columns, strict=True)), labels)


def fit(table: Table, font: str, size: int, look: Look) -> Table | None:
    """Returns as many columns and rows of a table as there is room for, from the first; None if none would be left."""
    widths = _widths(table, font, size)
    columns = sum(sum(widths[: n + 1]) + n * size <= look.room[0] for n in range(len(widths)))
    rows = look.room[1] // pitch(size) - bool(table.header)
    if columns <= table.labels or rows < 2:
        return None
    return Table(table.header[:columns], tuple(row[:columns] for row in table.rows[:rows]), table.labels)


def pitch(size: int) -> int:
    """Returns the distance of two lines of a text whose em square has a size, pixels."""
    return size * 3 // 2


def _widths(table: Table, font: str, size: int) -> list[int]:
    """Returns the width of each column, pixels."""
    opened = open_font(font, size)
    return [int(max(map(opened.getlength, column))) + 1 for column in zip(*table.lines, strict=True)]


def _put(
    rng: random.Random, canvas: Canvas, table: Table, font: str, size: int, look: Look
) -> tuple[tuple[Placed, ...], ...]:
    """Draws a table anywhere on the page, with or without rules; returns its texts by lines."""
    widths, high = _widths(table, font, size), pitch(size)
    wide, tall = sum(widths) + size * (len(widths) - 1), high * len(table.lines)
    gap = size + rng.randint(0, (look.room[0] - wide) // max(len(widths) - 1, 1) // 2)
    wide += (gap - size) * (len(widths) - 1)
    left = look.margin + rng.randint(0, look.room[0] - wide)
    top = look.margin + rng.randint(0, look.room[1] - tall)
    starts = [left + sum(widths[:n]) + n * gap for n in range(len(widths))]
    lines = []
    for number, line in enumerate(table.lines):
        baseline = top + number * high + size * 11 // 10
        placed = []
        for column, text in enumerate(line):
            if column < table.labels:
                placed.append(canvas.write(text, (starts[column], baseline), font, size))
            else:
                placed.append(canvas.write(text, (starts[column] + widths[column], baseline), font, size, "rs"))
        lines.append(tuple(placed))
    _rule(rng.choice(_RULES), canvas, table, (left, top, left + wide, top + tall), starts[1:], gap, look)
    return tuple(lines)


def _rule(style: str, canvas: Canvas, table: Table, box, starts: list[int], gap: int, look: Look) -> None:
    """Draws the rules of a style between the lines, and for "grid" between the columns."""
    left, top, right, bottom = box
    high = (bottom - top) // len(table.lines)
    between = range(1, len(table.lines)) if style in ("rows", "grid") else [1] if style == "header" else []
    for number in between:
        canvas.rule((left, top + number * high), (right, top + number * high), look.faint)
    for start in starts if style == "grid" else []:
        canvas.rule((start - gap // 2, top), (start - gap // 2, bottom), look.faint)


def questions(rng: random.Random, table: Table) -> tuple[Question, ...]:
    """Returns a question of each kind about a table; rows are counted below the header."""
    row, column = rng.randrange(len(table.rows)), rng.randrange(table.labels, len(table.rows[0]))
    numbers = [own[column] for own in table.rows]
    name = table.header[column] if table.header else f"number in column {column + 1}"
    asked = [
        Question("cell", f"What is the {name} in row {row + 1}?", numbers[row]),
        Question("count", "How many rows of numbers are there?", str(len(table.rows))),
        Question("largest", f"What is the largest {name}?", max(numbers, key=float)),
    ]
    labels = [own[0] for own in table.rows] if table.labels else []
    if table.header and labels.count(table.rows[row][0]) == 1:
        asked.append(Question("label", f"What is the {name} of {table.rows[row][0]}?", numbers[row]))
    other = rng.choice([n for n in range(len(numbers)) if n != row])
    if float(numbers[row]) != float(numbers[other]):
        larger = float(numbers[row]) > float(numbers[other])
        text = f"Is the {name} larger in row {row + 1} than in row {other + 1}?"
        asked.append(Question("yes/no", text, "yes" if larger else "no"))
    return tuple(asked)
