"""Draws running text from the documentation of real modules, and asks about its words."""

import random
from collections.abc import Sequence

from fastvlm_jax.data.sets.documents.canvas import Canvas, Placed
from fastvlm_jax.data.sets.documents.fonts import drawing, open_font
from fastvlm_jax.data.sets.documents.look import Look, smaller
from fastvlm_jax.data.sets.documents.page import Page, Question
from fastvlm_jax.data.sets.documents.texts import read_texts

_FEWEST, _MOST = 3, 60  # words of a page
_ANCHORS = {"ls": 0.0, "ms": 0.5, "rs": 1.0}  # where a line stands in its room: left, in the middle, right
_PITCHES = (1.25, 1.4, 1.6)  # distance of two lines, em


def draw(rng: random.Random, split: str, look: Look) -> Page:
    """Returns a page with the first words of a paragraph of a split, as many as there is room for.

    Raises:
      NoRoom: less than 3 words fit.
    """
    module, words = choose(rng, split)
    font, size, spacing = rng.choice(drawing("".join(words))), look.font_size, rng.choice(_PITCHES)
    while len(lines := wrap(words, font, size, look.room, spacing)) == 0:
        size = smaller(size)
    canvas = Canvas(look.size, look.paper, look.ink)
    placed = _put(rng, canvas, lines, font, size, spacing, look)
    return Page("words", canvas.picture, placed, size, module, questions(rng, lines, words))


def choose(rng: random.Random, split: str) -> tuple[str, list[str]]:
    """Returns a module of a split, and the words of one of its paragraphs; long modules come as often as short ones."""
    module = rng.choice(list(read_texts(split)))
    return module, rng.choice(read_texts(split)[module]).split()


def wrap(words: Sequence[str], font: str, size: int, room: tuple[int, int], spacing: float) -> list[list[str]]:
    """Returns the words in lines of the room's width, until its height or a page's number of words is reached.

    A word wider than a line ends the text; a text of too few words gives no lines.
    """
    opened, most = open_font(font, size), int(room[1] / (size * spacing))
    lines: list[list[str]] = []
    taken = 0
    for word in words[:_MOST]:
        if opened.getlength(word) > room[0]:
            break
        if lines and opened.getlength(" ".join([*lines[-1], word])) <= room[0]:
            lines[-1].append(word)
        elif len(lines) < most:
            lines.append([word])
        else:
            break
        taken += 1
    return lines if taken >= _FEWEST else []


def _put(
    rng: random.Random, canvas: Canvas, lines: list[list[str]], font: str, size: int, spacing: float, look: Look
) -> tuple[tuple[Placed, ...], ...]:
    """Draws lines of text, with a rule above and below or without; returns its pieces, one a line."""
    anchor, high = rng.choice(list(_ANCHORS)), int(size * spacing)
    top = look.margin + rng.randint(0, look.room[1] - high * len(lines))
    x = look.margin + int(_ANCHORS[anchor] * look.room[0])
    placed = [
        (canvas.write(" ".join(line), (x, top + number * high + size), font, size, anchor),)
        for number, line in enumerate(lines)
    ]
    if rng.random() < 0.3:
        for y in (look.margin // 2, look.size[1] - 1 - look.margin // 2):
            canvas.rule((look.margin, y), (look.size[0] - look.margin, y), look.faint, rng.randint(1, 2))
    return tuple(placed)


def questions(rng: random.Random, lines: list[list[str]], paragraph: Sequence[str]) -> tuple[Question, ...]:
    """Returns a question of each kind about lines of words; only words of letters are asked for."""
    shown = {word for line in lines for word in line if word.isalpha()}
    page = " ".join(" ".join(line) for line in lines).lower()
    hidden = {word for word in paragraph if word.isalpha() and word.lower() not in page}
    asked = [Question("count", "How many lines of text are there?", str(len(lines)))]
    if ends := [number for number, line in enumerate(lines) if line[-1].isalpha()]:
        number = rng.choice(ends)
        asked.append(Question("cell", f"What is the last word of line {number + 1}?", lines[number][-1]))
    if shown and hidden:
        there = rng.random() < 0.5
        word = rng.choice(sorted(shown if there else hidden))
        asked.append(Question("yes/no", f'Is the word "{word}" on the page?', "yes" if there else "no"))
    return tuple(asked)
