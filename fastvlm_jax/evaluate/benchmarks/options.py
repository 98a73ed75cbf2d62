"""Reads and writes the options of a question, and marks an answer by the letter that a rule reads in it.

options ("leaf", "frog")   lines "A. leaf\\nB. frog"   letters "AB"   reference "B"
"""

import ast
import itertools
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import OPTION_LETTER, Mark, Row

MAX_TEXT = 1 << 20  # characters of a list of options in Python's notation


def lines(options: Sequence[str]) -> str:
    """Returns the options, a line each: "A. leaf"."""
    return "\n".join(f"{letter}. {option}" for letter, option in lettered(options))


def question(row: Row) -> str:
    """Returns the text of lmms-eval's default: the question, its options in lines and the sentence of the format."""
    return f"{row.question}\n{lines(row.fields['choices'])}{OPTION_LETTER}"


def letters(options: Sequence[str]) -> str:
    """Returns the letters of the options: "ABC" for three."""
    return ascii_uppercase[: len(options)]


def lettered(options: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the options with their letters: [("A", "leaf"), ("B", "frog")]."""
    return list(zip(letters(options), options, strict=True))


def mark(letter: str | None, row: Row) -> Mark:
    """Returns the mark of a letter, which is right if it is the row's reference."""
    return Mark(float(letter in row.references), letter)


def marker(read: Callable[[str, str], str | None]) -> Callable[[str, Row], Mark]:
    """Returns the function `Protocol.score` of a rule: `read(answer, "ABC")` is the letter that it reads, or None."""
    return lambda answer, row: mark(read(answer, letters(row.fields["choices"])), row)


def read(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Returns row[key], a published list of options; the error, if it is not 1 to 26 texts, names `where`."""
    return check(published.texts(row, key, where), f"{where}: {key}")


def check(options: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Returns the options; the error, if there are more than letters, names `where`."""
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{where} are {len(options)} options, more than letters")
    return options


def cells(row: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the options of a row of VLMEvalKit's table: its cells A, B, ... until the first that is empty."""
    return tuple(itertools.takewhile(bool, (row.get(letter) for letter in ascii_uppercase)))


def parse(text: Any, where: str) -> list[Any]:
    """Returns the list that a text holds in Python's notation; the error, if it holds none, names `where`."""
    try:
        value = ast.literal_eval(text) if isinstance(text, str) and len(text) <= MAX_TEXT else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{where} is not a list in Python's notation, as \"['2', '4']\"")
    return value


def one_of(letters: str, row: Mapping[str, Any], key: str, where: str) -> str:
    """Returns row[key], the published letter of an option; the error, if it is none of `letters`, names `where`."""
    value = published.get(row, key, where)
    if value not in tuple(letters):
        raise ValueError(f"{where}: {key} is {shown(value)}, the letter of none of its options")
    return value


def letter(index: Any, options: Sequence[str], where: str) -> str:
    """Returns the letter of the right option by its published index, a number or its digits.

    Raises:
      ValueError: it is no index of an option; the message names `where`.
    """
    if str(index) not in map(str, range(len(options))):
        raise ValueError(f"{where} is {shown(index)}, not the index of one of its {len(options)} options, from 0")
    return letters(options)[int(index)]
