"""GQA, testdev_balanced: questions about scenes, composed by a program, with one short answer each."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import (
    SHORT_ANSWER,
    Benchmark,
    Mark,
    Picture,
    Protocol,
    Result,
    Row,
    ask_llava,
    ask_lmms_eval,
)
from fastvlm_jax.evaluate.benchmarks.llava_questions import read_llava_questions
from fastvlm_jax.evaluate.scores import equality, gqa

QUESTIONS = "testdev_balanced_questions.json"
LLAVA = "llava_gqa_testdev_balanced.jsonl"
FILES = (
    f"{QUESTIONS} and the folder images, or both in the folder data, and LLaVA's {LLAVA} if it is there",
    "testdev_balanced_instructions/*.parquet and testdev_balanced_images/*.parquet",
)


def read(folder: epath.Path) -> list[Row]:
    """Reads the questions, in the order of LLaVA's file where it is there.

    Raises:
      FileNotFoundError, ValueError: files or images are missing or damaged; the message is one line that names them.
    """
    if official := published.find(folder, QUESTIONS, f"*/{QUESTIONS}"):
        return _read_official(folder, official[0])
    tables = published.find(
        folder, "testdev_balanced_instructions/*.parquet", "*/testdev_balanced_instructions/*.parquet"
    )
    if tables:
        return _read_parquet(tables)
    if published.find(folder, LLAVA):
        raise FileNotFoundError(f"{folder} holds LLaVA's questions alone: the answers are in GQA's {QUESTIONS}")
    raise published.wrong_layout(folder, FILES)


def _read_official(folder: epath.Path, path: epath.Path) -> list[Row]:
    entries = published.read_json(path)
    images = published.Images(folder, "images", "data/images")
    rows = []
    for key, question in _asked(folder, entries):
        where = f"{path} question {shown(key)}"
        if key not in entries:
            raise ValueError(f"{path} has no question {shown(key)}, which {LLAVA} asks: they are of different versions")
        entry = entries[key]
        if not isinstance(entry, dict):
            raise ValueError(f"{where} holds no object")
        picture = images(published.text(entry, "imageId", where) + ".jpg")
        rows.append(_row(key, question or published.text(entry, "question", where), picture, entry, where))
    images.check()
    return published.check_rows(rows, path)


def _asked(folder: epath.Path, entries: Mapping[str, Any]) -> Iterable[tuple[str, str | None]]:
    """Returns (id, question) of each question that LLaVA asks, or (id, None) of each that the official file has."""
    if llava := published.find(folder, LLAVA):
        return [(str(question.id), question.text) for question in read_llava_questions(llava[0])]
    return [(key, None) for key in entries]


def _read_parquet(tables: Sequence[epath.Path]) -> list[Row]:
    folder = tables[0].parent.parent / "testdev_balanced_images"
    files = published.find(folder, "*.parquet")
    if not files:
        raise FileNotFoundError(
            f"{tables[0].parent} needs its images beside it: there are no Parquet files in {folder}"
        )
    images = published.read_parquet(files, ["id"], ["image"])
    pictures = {published.text(row, "id", os.fspath(folder)): row["image"] for row in images}
    rows = []
    entries = published.read_parquet(tables, ["id", "imageId", "question", "answer"], optional=["types"])
    for number, entry in enumerate(entries):
        where = f"{tables[0].parent} row {number}"
        image = published.text(entry, "imageId", where)
        if pictures.get(image) is None:
            raise ValueError(f"{where}: {folder} has no image {shown(image)}")
        key, question = published.text(entry, "id", where), published.text(entry, "question", where)
        rows.append(_row(key, question, pictures[image], entry, where))
    return published.check_rows(rows, tables[0].parent)


def _row(key: str, question: str, picture: Picture, entry: Mapping[str, Any], where: str) -> Row:
    return Row(
        id=key,
        question=question,
        pictures=(picture,),
        references=(published.text(entry, "answer", where),),
        groups=_groups(entry.get("types")),
    )


def _groups(types: Any) -> dict[str, str]:
    """Returns the groups that GQA's script reports: open are the questions whose structure is a query."""
    types = types if isinstance(types, Mapping) else {}
    groups = {kind: types[kind] for kind in ("structural", "semantic") if isinstance(types.get(kind), str)}
    if "structural" in groups:
        groups["answers"] = "open" if groups["structural"] == "query" else "binary"
    return groups


def _score_llava(answer: str, row: Row) -> Mark:
    return Mark(gqa.llava(answer, row.references[0]), gqa.prediction_of(answer) or None)


def _score_lmms_eval(answer: str, row: Row) -> Mark:
    return Mark(equality.lmms_eval(answer, row.references[0]), equality.without_punctuation(answer) or None)


def submission(results: Sequence[Result]) -> list[dict[str, str]]:
    """Returns the predictions that GQA's script and server take."""
    return [{"questionId": result.row.id, "prediction": gqa.prediction_of(result.answer)} for result in results]


PAPER = Protocol(
    name="paper",
    version="LLaVA 2024-05",
    prompt=lambda row: ask_llava(row, row.question + SHORT_ANSWER),
    score=_score_llava,
    max_tokens=128,
    rule="equal to the answer, after lower-casing and without periods at the end",
)
LMMS_EVAL = Protocol(
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    prompt=lambda row: ask_lmms_eval(row, row.question + SHORT_ANSWER),
    score=_score_lmms_eval,
    max_tokens=16,
    rule="equal to the answer, both in lower case and without ASCII punctuation",
)
BENCHMARKS = (
    Benchmark(
        name="gqa",
        title="GQA, testdev_balanced",
        read=read,
        protocols=(PAPER, dataclasses.replace(PAPER, name="llava"), LMMS_EVAL),
        metric="exact match, %",
        size=12578,
        files=FILES,
        source="questions and images: GQA's site at Stanford; LLaVA's file: its eval.zip; Hugging Face: lmms-lab/GQA",
        paper="GQA",
        in_domain=True,
        submission=submission,
    ),
)
