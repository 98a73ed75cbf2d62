"""DocVQA, questions about scanned pages, and InfoVQA, about infographics: the validation and the test splits.

The answers of the test splits are not public: a submission is what the server takes.

paper       lmms-eval 0.2.2 makes 1 of every ANLS of 0.5 or more: the score is the share of such answers
lmms-eval   the mean ANLS, which the figures of `paper` have too
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import (
    NO_LLAVA,
    SHORT_ANSWER,
    Benchmark,
    Mark,
    Picture,
    Protocol,
    Result,
    Row,
    ask_lmms_eval,
    mean_by,
)
from fastvlm_jax.evaluate.scores import anls
from fastvlm_jax.text.conversation import Turn


class _Set(NamedTuple):
    """Describes the files of a set.

    Attributes:
      title: its published name.
      hub: name of its folder on the hub.
      types: key of the list of the types of a question, which also tells its tables from those of the other set.
      listing: start of the names of its lists, before the split.
      image: key of the name of an image in a list.
      folders: names that the folder of images may have.
    """

    title: str
    hub: str
    types: str
    listing: str
    image: str
    folders: tuple[str, ...]


DOCVQA = _Set("DocVQA", "DocVQA", "question_types", "", "image", ("documents", "spdocvqa_images", "images"))
INFOVQA = _Set(
    "InfoVQA", "InfographicVQA", "answer_type", "infographicsVQA_", "image_local_name",
    ("infographicsvqa_images", "images"),
)  # fmt: skip
LONG = {"val": "validation", "test": "test"}


def read(folder: epath.Path, what: _Set, split: str) -> list[Row]:
    """Returns the questions of a split, "val" or "test", from the tables of the hub or from the published list."""
    name = f"{what.listing}{split}_v1.0"
    tables = [f"{what.hub}/{LONG[split]}-*.parquet", f"{LONG[split]}-*.parquet"]
    lists = [f"{name}_withQT.json", f"{name}.json", f"*/{name}_withQT.json", f"*/{name}.json"]
    if found := published.find(folder, *tables):
        where = str(found[0].parent)
        rows = published.read_parquet(found, ("questionId", "question", "answers"), ("image",), (what.types,))
        if rows and what.types not in rows[0]:
            raise FileNotFoundError(f"{found[0]} has no column {what.types}: it is not a table of {what.title}")
        rows = [(row, published.pictures_of([row["image"]])) for row in rows]
    elif found := published.find(folder, *lists):
        images = published.Images(folder, *what.folders, *(f"{split}/{name}" for name in what.folders))
        where = str(found[0])
        listed = published.read_json(found[0]).get("data")
        if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
            raise ValueError(f"{where} has no list of questions under data: it is not the published file")
        # A list calls an image "documents/7.png" wherever the folder lies.
        rows = [
            (row, (images(published.text(row, what.image, f"{where} row {i}").rsplit("/", 1)[-1]),))
            for i, row in enumerate(listed)
        ]
        images.check()
    else:
        raise published.wrong_layout(folder, files(what, split))
    found = [_row(row, f"{where} row {i}", pictures, what, split) for i, (row, pictures) in enumerate(rows)]
    return published.check_rows(found, where)


def _row(row: dict[str, Any], where: str, pictures: tuple[Picture, ...], what: _Set, split: str) -> Row:
    number = published.get(row, "questionId", where)
    if not str(number).isdecimal():
        raise ValueError(f"{where}: questionId is {shown(number)}, not a number")
    references = published.texts(row, "answers", where) if split == "val" else None
    types = row.get(what.types)
    fields = {"types": tuple(map(str, types))} if isinstance(types, list) else {}
    return Row(str(number), published.text(row, "question", where), pictures, references, fields)


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation: the question and LLaVA's sentence for short answers."""
    return ask_lmms_eval(row, row.question + SHORT_ANSWER)


def score(answer: str, row: Row) -> Mark:
    """Returns the ANLS of an answer."""
    return Mark(anls.score(answer, row.references), anls.normalise(answer))


def score_0_2(answer: str, row: Row) -> Mark:
    """Returns 1 for an ANLS of 0.5 or more, else 0."""
    return Mark(anls.score_0_2(answer, row.references), anls.normalise(answer))


def figures_0_2(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the mean ANLS, %, beside the scores of the types."""
    mean = sum(anls.score(result.answer, result.row.references) for result in results) / len(results)
    return {"anls": 100 * mean, **figures(results)}


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the mean score, %, of the questions of each type; a question may be of several types."""
    scores = ((name, result.mark.score) for result in results for name in result.row.fields.get("types", ()))
    return {"by_type": mean_by(scores)}


def submission(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns what the server of the Robust Reading Competition takes."""
    return [{"questionId": int(result.row.id), "answer": result.answer} for result in results]


def files(what: _Set, split: str) -> tuple[str, ...]:
    """Returns a line of the expected files for each layout."""
    name = f"{what.listing}{split}_v1.0"
    old = f"{name}_withQT.json or {name}.json" if split == "val" else f"{name}.json"
    return (f"{what.hub}/{LONG[split]}-*.parquet", f"{old}, {what.folders[0]}/ with the images")


PROTOCOLS = (
    Protocol("paper", "lmms-eval 0.2.2", prompt, score_0_2, 32, anls.RULE_0_2, figures=figures_0_2),
    Protocol("lmms-eval", "lmms-eval 0.7.3", prompt, score, 32, anls.RULE, figures=figures),
)


def _benchmark(what: _Set, split: str, size: int) -> Benchmark:
    name = what.title.lower()
    return Benchmark(
        name=name if split == "val" else f"{name}-test",
        title=f"{what.title}, {LONG[split]}",
        read=functools.partial(read, what=what, split=split),
        protocols=PROTOCOLS,
        metric="ANLS, %; paper: share of 0.5 or more, %" if split == "val" else "ANLS, by the server",
        size=size,
        files=files(what, split),
        source="rrc.cvc.uab.es, challenge Document Visual Question Answering; Hugging Face: lmms-lab/DocVQA",
        paper=what.title if split == "val" else "",
        in_domain=what is DOCVQA,
        refused=NO_LLAVA,
        submission=submission if split == "test" else None,
    )


BENCHMARKS = (
    _benchmark(DOCVQA, "val", 5349),
    _benchmark(DOCVQA, "test", 5188),
    _benchmark(INFOVQA, "val", 2801),
    _benchmark(INFOVQA, "test", 3288),
)
