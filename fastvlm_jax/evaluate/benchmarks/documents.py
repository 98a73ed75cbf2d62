"""Scores reading on the test split of `fastvlm data documents`: transcriptions by characters, questions by exact match.

documents            transcriptions of whole pages
documents-qa         questions about them
documents-blind      the rows of documents, each shown the next page of the same size in place of its own: what the same
documents-qa-blind   model has without looking, since the best alignment of a random answer finds some points too
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.sources import RecordSource, read_shards
from fastvlm_jax.evaluate import exact_match
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Protocol, Result, Row
from fastvlm_jax.evaluate.records import own_prompt, rows_of
from fastvlm_jax.evaluate.scores import characters

TRANSCRIPTION = "transcription"  # what the first question of every page asks for
TEXT_SIZES = ((16, "16 px or less"), (24, "17 to 24 px"), (34, "25 to 34 px"))  # largest of each group
LARGEST = "35 px or more"


def read(folder: epath.Path, questions: bool = False, blind: bool = False) -> list[Row]:
    """Returns the rows of the test split of the full set, or of its part for tiny models.

    They are asked as in training, each question alone. Their groups are the kind of the page, what is asked for, and
    the size of the smallest text of the page, which is the em square of its font.

    Args:
      questions: whether to ask the questions about the pages, in place of their transcriptions.
      blind: whether to show the next page of the same size in place of the right one.

    Raises:
      FileNotFoundError: there are no such shards, or they hold no questions.
      ValueError: they are of another data set or damaged, or hold no other page to show.
    """
    source = read_shards(folder, "test")
    rows: dict[str, list[Row]] = {}
    for row in rows_of(source, "separate"):
        if "unusable" in row.fields:
            raise ValueError(f"record {row.fields['record']} of {folder} cannot be scored: {row.fields['unusable']}")
        rows.setdefault(row.fields["record"], []).append(row)
    facts = _facts(source, rows)
    shown = _next_of_size(facts, folder) if blind else {key: key for key in facts}
    found = [
        dataclasses.replace(row, pictures=rows[shown[key]][0].pictures, groups=_groups(facts[key], asked))
        for key, own in rows.items()
        for row, asked in zip(own, facts[key]["asked"], strict=True)
        if (asked != TRANSCRIPTION) == questions
    ]
    if not found:
        raise FileNotFoundError(f"the test split of {folder} holds no {'questions' if questions else 'transcriptions'}")
    return found


def _facts(source: RecordSource, rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Returns what the records say of their pages, by key."""
    facts = {}
    for number in range(len(source)):
        record = source[number]
        asked, size, text = (record.extra.get(name) for name in ("asked", "size", "font_size"))
        told = isinstance(asked, list) and isinstance(size, list) and all(isinstance(n, int) for n in (*size, text))
        if not told or len(asked) != len(rows[record.key]):
            raise ValueError(
                f"record {record.key} of {source.folder} does not say what is asked: "
                "write the pages with `fastvlm data documents`"
            )
        facts[record.key] = record.extra
    return facts


def _next_of_size(facts: Mapping[str, Mapping[str, Any]], folder: epath.Path) -> dict[str, str]:
    """Returns the key of each page -> that of the next page of its size, or of any size if there is no other."""
    if len(facts) < 2:
        raise ValueError(f"the test split of {folder} holds one page, and no other to show in its place")
    sizes: dict[tuple[int, ...], list[str]] = {}
    for key, about in facts.items():
        sizes.setdefault(tuple(about["size"]), []).append(key)
    following = {}
    for keys in (list(facts), *(same for same in sizes.values() if len(same) > 1)):
        following |= dict(zip(keys, [*keys[1:], keys[0]], strict=True))
    return following


def _groups(about: Mapping[str, Any], asked: str) -> dict[str, str]:
    text = next((name for largest, name in TEXT_SIZES if about["font_size"] <= largest), LARGEST)
    return {"page": str(about.get("kind", "")), "asked": str(asked), "text": text}


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of a transcription by its characters."""
    return Mark(characters.score(answer, row.references[0]), characters.normalise(answer))


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns "accuracy_exact", the share of pages without a wrong character."""
    return {"accuracy_exact": sum(result.mark.score == 1 for result in results) / max(len(results), 1)}


TRANSCRIBED = Protocol(
    name="own",
    version="fastvlm_jax",
    prompt=own_prompt,
    score=score,
    max_tokens=512,
    rule=characters.RULE,
    figures=figures,
)
ASKED = dataclasses.replace(TRANSCRIBED, score=exact_match.mark, max_tokens=32, rule=exact_match.RULE, figures=None)


def _benchmark(name: str, title: str, questions: bool, blind: bool) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        read=functools.partial(read, questions=questions, blind=blind),
        protocols=(ASKED if questions else TRANSCRIBED,),
        metric="exact match, %" if questions else "characters right, %",
        size=0,
        files=("the shards that `fastvlm data documents` writes",),
        source="the PyPI packages scikit-learn and vega-datasets, the standard library of Python",
    )


BENCHMARKS = (
    _benchmark("documents", "Documents, test", False, False),
    _benchmark("documents-blind", "Documents, test, blind", False, True),
    _benchmark("documents-qa", "Documents, questions", True, False),
    _benchmark("documents-qa-blind", "Documents, questions, blind", True, True),
)
