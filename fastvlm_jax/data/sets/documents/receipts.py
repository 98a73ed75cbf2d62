"""Draws receipts of real words at prices of real digits, and asks what was bought and what it cost."""

import random
from typing import NamedTuple

from fastvlm_jax.data.sets.documents.canvas import Canvas, Placed
from fastvlm_jax.data.sets.documents.data_sets import read_data_sets
from fastvlm_jax.data.sets.documents.fonts import drawing, open_font
from fastvlm_jax.data.sets.documents.look import Look, smaller
from fastvlm_jax.data.sets.documents.page import Page, Question
from fastvlm_jax.data.sets.documents.tables import pitch
from fastvlm_jax.data.sets.documents.words import choose as choose_words

_MOST_ITEMS = 7
_TAXES = (0, 0, 5, 7, 8, 19, 20)  # percent; a receipt without tax shows the total alone


class Item(NamedTuple):
    """Holds a line of a receipt: what was bought, how often, and the price of one in cents."""

    name: str
    count: int
    price: int


class Receipt(NamedTuple):
    """Holds a receipt; amounts are cents.

    Attributes:
      shop: its first line.
      items: what was bought.
      percent: tax on the sum of the items, percent; 0 shows no tax.
    """

    shop: str
    items: tuple[Item, ...]
    percent: int

    @property
    def subtotal(self) -> int:
        return sum(item.count * item.price for item in self.items)

    @property
    def tax(self) -> int:
        """Returns the tax, half a cent rounded up."""
        return (self.subtotal * self.percent + 50) // 100

    @property
    def total(self) -> int:
        return self.subtotal + self.tax

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """Returns the texts of each line below the shop: what stands at the left, and the amount at the right."""
        lines = [(f"{item.count} {item.name}", money(item.count * item.price)) for item in self.items]
        if self.percent:
            lines += [("Subtotal", money(self.subtotal)), (f"Tax {self.percent}%", money(self.tax))]
        return [*lines, ("Total", money(self.total))]


def money(cents: int) -> str:
    """Returns an amount as it is printed: 1799 -> "17.99"."""
    return f"{cents // 100}.{cents % 100:02d}"


def draw(rng: random.Random, split: str, look: Look) -> Page:
    """Returns a page with a receipt whose words and digits are of a split.

    Raises:
      NoRoom: it does not fit.
    """
    source, receipt = choose(rng, split)
    text = receipt.shop + "".join(map("".join, receipt.lines))
    font, size = rng.choice(drawing(text)), look.font_size
    while not _fits(receipt, font, size, look):
        if len(receipt.items) > 2:
            receipt = receipt._replace(items=receipt.items[:-1])
        else:
            size = smaller(size)
    canvas = Canvas(look.size, look.paper, look.ink)
    lines = _put(rng, canvas, receipt, font, size, look)
    return Page("receipt", canvas.picture, lines, size, source, questions(rng, receipt))


def choose(rng: random.Random, split: str) -> tuple[str, Receipt]:
    """Returns the data set of the prices, and a random receipt."""
    source = rng.choice(read_data_sets(split))
    column = source.columns[rng.choice(list(source.columns))]
    names: list[str] = []
    while len(names) < _MOST_ITEMS + 1:
        _, words = choose_words(rng, split)
        found = {word.capitalize() for word in words if word.isalpha() and 5 <= len(word) <= 12}
        names += rng.sample(sorted(found - set(names)), min(2, len(found - set(names))))
    items = [
        Item(name, rng.choice((1, 1, 1, 2, 3, 4)), cents(rng.choice(column)))
        for name in names[1 : 1 + rng.randint(2, _MOST_ITEMS)]
    ]
    return source.name, Receipt(names[0], tuple(items), rng.choice(_TAXES))


def cents(number: str) -> int:
    """Returns the price that the first four digits of a number make, dollars if they are only one or two.

    "17.99" -> 1799   "-0.1184" -> 1184   "870" -> 870   "5.1" -> 5100   "0" -> 500
    """
    digits = "".join(filter(str.isdigit, number)).lstrip("0")[:4] or "5"
    return int(digits) * (1 if len(digits) > 2 else 100)


def _fits(receipt: Receipt, font: str, size: int, look: Look) -> bool:
    opened = open_font(font, size)
    widths = [opened.getlength(receipt.shop), *(opened.getlength("  ".join(line)) for line in receipt.lines)]
    return max(widths) + 2 <= look.room[0] and (len(receipt.lines) + 1) * pitch(size) <= look.room[1]


def _put(
    rng: random.Random, canvas: Canvas, receipt: Receipt, font: str, size: int, look: Look
) -> tuple[tuple[Placed, ...], ...]:
    """Draws a receipt from margin to margin, with rules around the items or without; returns its texts by lines."""
    high, left, right = pitch(size), look.margin, look.size[0] - look.margin
    top = look.margin + rng.randint(0, look.room[1] - high * (len(receipt.lines) + 1))
    lines = [(canvas.write(receipt.shop, ((left + right) // 2, top + size), font, size, "ms"),)]
    for number, (name, amount) in enumerate(receipt.lines, 1):
        baseline = top + number * high + size
        lines.append(
            (
                canvas.write(name, (left, baseline), font, size),
                canvas.write(amount, (right, baseline), font, size, "rs"),
            )
        )
    if rng.random() < 0.6:
        for number in (1, 1 + len(receipt.items)):
            y = top + number * high - size // 12
            canvas.rule((left, y), (right, y), look.faint)
    return tuple(lines)


def questions(rng: random.Random, receipt: Receipt) -> tuple[Question, ...]:
    """Returns a question of each kind about a receipt."""
    item = rng.choice(receipt.items)
    limit = receipt.total + rng.choice((-1, 1)) * rng.randint(1, receipt.total)
    return (
        Question("total", "What is the total?", money(receipt.total)),
        Question("cell", f"How much was paid for {item.name}?", money(item.count * item.price)),
        Question("count", f"How many {item.name} were bought?", str(item.count)),
        Question("yes/no", f"Is the total more than {money(limit)}?", "yes" if receipt.total > limit else "no"),
    )
