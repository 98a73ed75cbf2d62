"""Reads from OpenMoji's list which things the icons show, and what each is called.

    {"hexcode": "1F417", "annotation": "boar", "tags": "pig", "subgroups": "animal-mammal", ...}

    captions    "boar"    "boar, pig"    "animal mammal, pig"

A concept is a sequence of code points of Unicode, without the mark that asks for colours (FE0F). Variants of a concept
by skin tone, sex or direction are left out, as are flags: most styles draw them as they draw another concept, or as
every other style does.
"""

import json
import re
from collections import Counter
from typing import Any, NamedTuple

GROUPS = (
    "smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places", "activities", "objects",
    "symbols",
)  # fmt: skip
_COLOURED = "FE0F"
_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_SEX_OR_DIRECTION = {"2640", "2642", "27A1"}  # behind another sign: a woman's, a man's, one facing right
_PLAIN = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}“”", '\'""')
_MAN_OR_WOMAN = {"1F468", "1F469"}  # in front of another sign: "man astronaut"


class Concept(NamedTuple):
    """Describes what several icons show.

    Attributes:
      code: its code points, such as "1F417" or "1F9D1-200D-1F680".
      name: English name, in lower case; no other concept has it.
      group: group of Unicode, one of GROUPS.
      captions: the name; perhaps the name with OpenMoji's tags, and the kind of thing with the tags. No other concept
        has any of them, so that no pair of a batch is the right answer to another's caption.
    """

    code: str
    name: str
    group: str
    captions: tuple[str, ...]


def code_of(text: str) -> str:
    """Returns code points in hexadecimal digits as Concept.code has them: "0023-fe0f-20e3" -> "0023-20E3".

    Raises:
      ValueError: the text is something else.
    """
    points = (f"{int(part, 16):04X}" for part in text.split("-"))
    return "-".join(point for point in points if point != _COLOURED)


def read_concepts(listed: bytes) -> list[Concept]:
    """Returns the concepts in OpenMoji's data/openmoji.json, in Unicode's order."""
    entries = {}
    for entry in json.loads(listed):
        code = code_of(entry["hexcode"])
        if entry["group"] in GROUPS and not is_variant(code):
            entries.setdefault(code, entry)
    captions = {code: _captions(entry) for code, entry in entries.items()}
    count = Counter(text for own in captions.values() for text in own)
    return [
        Concept(code, own[0], entries[code]["group"], tuple(text for text in own if count[text] == 1))
        for code, own in captions.items()
        if count[own[0]] == 1
    ]


def is_variant(code: str) -> bool:
    """Returns whether code points say the skin tone, the sex or the direction of what another concept shows."""
    first, *others = code.split("-")
    told = not _SKIN_TONES.isdisjoint([first, *others]) or not _SEX_OR_DIRECTION.isdisjoint(others)
    return told or (first in _MAN_OR_WOMAN and bool(others))


def _captions(entry: dict[str, Any]) -> list[str]:
    """Returns the name of an entry, then the captions with its tags, if they say more than the name."""
    name, kind = _plain(entry["annotation"]), entry["subgroups"].replace("-", " ")
    tags = [tag for tag in _plain(entry["tags"]).split(", ") if not set(tag.split()) <= set(re.findall(r"\w+", name))]
    return [name, ", ".join([name, *tags]), ", ".join([kind, *tags])] if tags else [name]


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PLAIN).split())
