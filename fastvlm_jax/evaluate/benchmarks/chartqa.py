"""ChartQA: questions about charts, written by people and made of captions; scored by relaxed accuracy."""

from typing import Any

from etils import epath

from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Picture, Protocol, Row, ask_lmms_eval
from fastvlm_jax.evaluate.published import (
    Images,
    check_rows,
    find,
    pictures_of,
    read_json,
    read_parquet,
    text,
    wrong_layout,
)
from fastvlm_jax.evaluate.scores import relaxed_accuracy
from fastvlm_jax.text.conversation import Turn

TYPES = ("human", "augmented")
FILES = ("data/test-*.parquet", "test/test_human.json, test/test_augmented.json, test/png/ with the images")
# "ChartQA Dataset" is the folder in the published archive.
LISTS = tuple(f"{parent}test_human.json" for parent in ("", "test/", "ChartQA Dataset/test/"))


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions of the test split, those of people first, from the table of the hub or published lists."""
    if found := find(folder, "data/test-*.parquet", "test-*.parquet"):
        where = str(found[0].parent)
        rows = read_parquet(found, ("type", "question", "answer"), ("image",))
        return check_rows([_hub(row, f"{where} row {i}", i) for i, row in enumerate(rows)], where)
    if not (found := find(folder, *LISTS)):
        raise wrong_layout(folder, FILES)
    folder, rows = found[0].parent, []
    images = Images(folder, "png")
    for kind in TYPES:
        path = folder / f"test_{kind}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {path.name}: half of the questions are in it")
        for i, row in enumerate(read_json(path, list)):
            where = f"{path} row {i}"
            if not isinstance(row, dict):
                raise ValueError(f"{where} is no object: it is not the published file")
            pictures = (images(text(row, "imgname", where)),)
            rows.append(_row(len(rows), text(row, "query", where), text(row, "label", where), kind, pictures))
    images.check()
    return check_rows(rows, folder)


def _hub(row: dict[str, Any], where: str, number: int) -> Row:
    kind = text(row, "type", where).removesuffix("_test")
    if kind not in TYPES:
        raise ValueError(f"{where}: type is {kind[:80]!r}: the types are human_test and augmented_test")
    pictures = pictures_of([row["image"]])
    return _row(number, text(row, "question", where), text(row, "answer", where), kind, pictures)


def _row(number: int, question: str, answer: str, kind: str, pictures: tuple[Picture, ...]) -> Row:
    return Row(str(number), question, pictures, (answer,), {}, {"type": kind})


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation: the question and a sentence of its own for short answers."""
    return ask_lmms_eval(row, f"{row.question}\nAnswer the question with a single word.")


def score(answer: str, row: Row) -> Mark:
    """Returns the relaxed accuracy of an answer."""
    return Mark(relaxed_accuracy.score(answer, row.references[0]), answer)


BENCHMARKS = (
    Benchmark(
        name="chartqa",
        title="ChartQA, test",
        read=read,
        protocols=tuple(
            Protocol(name, version, prompt, score, 16, relaxed_accuracy.RULE)
            for name, version in (("paper", "lmms-eval 0.2.2"), ("lmms-eval", "lmms-eval 0.7.3"))
        ),
        metric="relaxed accuracy, %",
        size=2500,
        files=FILES,
        source="vis-nlp/ChartQA on GitHub; lmms-lab/ChartQA on the hub",
        paper="ChartQA",
        in_domain=True,
        refused={"llava": "LLaVA has no script for it"},
    ),
)
