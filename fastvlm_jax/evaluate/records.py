"""Turns records, the unit of a data set, into rows: every question of a record is a row, asked as in training.

Record "7"      user (0, "what colour?")  assistant "red"  user "is it blue?"  assistant "no"
"separate"      row "7/0"  user (0, "what colour?")                                                 references ("red",)
                row "7/1"  user (0, "is it blue?")                                                  references ("no",)
"conversation"  row "7/1"  user (0, "what colour?")  assistant "red"  user "is it blue?"            references ("no",)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.evaluate.benchmark import Picture, Row
from fastvlm_jax.text.conversation import Turn, questions, renumbered, split_system

TURNS = ("conversation", "separate")


def rows_of(
    records: RecordSource | Sequence[Record], turns: str = "conversation", limit: int | None = None
) -> list[Row]:
    """Returns the questions of the records, in order; the images are read again when they are needed.

    A record that is damaged, or whose turns do not alternate between user and assistant, becomes one row that cannot be
    asked: `own_prompt` says why.

    Args:
      records: a split of a data set, or a list of records.
      turns: "conversation" asks every question of a record with the earlier questions and their reference answers
        before it; "separate" asks each alone, with the images of the first turn. Both as `data.turns` makes samples.
      limit: number of questions of usable records, behind which no more records are read; None reads all.

    Returns:
      Rows whose fields hold "record", the key of the record, and "turns", the conversation to ask.
    """
    if turns not in TURNS:
        raise ValueError(f"unknown turns {turns!r}: choose {' or '.join(TURNS)}")
    record_at = functools.lru_cache(maxsize=2)(records.__getitem__)  # the rows of a record follow each other
    rows: list[Row] = []
    seen: set[str] = set()
    left = math.inf if limit is None else limit  # questions of usable records still to be read
    for number in range(len(records)):
        if left <= 0:
            break
        key = f"record {number}"
        try:
            record = record_at(number)
            key = record.key
            found = _rows(record, key, number, turns, record_at)[: None if limit is None else left]
            left -= len(found)
        except ValueError as error:
            found = [Row(key, "", (), (), {"record": key, "unusable": str(error)})]
        if any(row.id in seen for row in found):  # keys repeat in published data
            found = [dataclasses.replace(row, id=f"{row.id} (record {number})") for row in found]
        seen.update(row.id for row in found)
        rows += found
    return rows


def own_prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the row's own conversation.

    Raises:
      ValueError: its record cannot be asked about; the message is the reason.
    """
    if "unusable" in row.fields:
        raise ValueError(row.fields["unusable"])
    return row.fields["turns"]


def _rows(record: Record, key: str, number: int, turns: str, record_at: Callable[[int], Record]) -> list[Row]:
    talks = questions(record.turns)
    if turns == "conversation":
        system, talk = split_system(record.turns)
        talks = [(*system, *talk[: 2 * i + 2]) for i in range(len(talk) // 2)]
    rows = []
    for i, talk in enumerate(talks):
        named = sorted({part for _, content in talk[:-1] for part in content if isinstance(part, int)})
        pictures = tuple(
            Picture(f"record {number} image {n}", functools.partial(_read, record_at, number, n)) for n in named
        )
        asked = renumbered(talk[:-1], named)
        fields = {"record": record.key, "turns": asked}
        name = f"{key}/{i}" if len(talks) > 1 else key
        rows.append(Row(name, text_of(asked[-1]), pictures, (text_of(talk[-1]),), fields))
    return rows


def _read(record_at: Callable[[int], Record], number: int, image: int) -> bytes:
    return record_at(number).images[image]


def text_of(turn: Turn) -> str:
    """Returns the text of a turn, without its images."""
    return "".join(part for part in turn[1] if isinstance(part, str))
