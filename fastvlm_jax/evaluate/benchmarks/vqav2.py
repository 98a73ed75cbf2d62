"""VQAv2: questions about photos of COCO, each answered by ten people; validation, and test-dev for VQA's server."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
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
from fastvlm_jax.evaluate.scores import vqa_accuracy
from fastvlm_jax.evaluate.scores.evalai import normalise, normalise_lightly

VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANSWERS = "v2_mscoco_val2014_annotations.json"
DEV_QUESTIONS = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
TEST_QUESTIONS = "v2_OpenEnded_mscoco_test2015_questions.json"
DEV_LLAVA = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST_LLAVA = "llava_vqav2_mscoco_test2015.jsonl"
VAL_FILES = (
    f"{VAL_QUESTIONS}, {VAL_ANSWERS} and COCO's images in the folder val2014",
    "validation-*.parquet, in the folder or in its folder data",
)
DEV_FILES = (
    f"{DEV_LLAVA}, {TEST_LLAVA} and COCO's images in the folder test2015",
    f"{DEV_QUESTIONS}, {TEST_QUESTIONS} and COCO's images in the folder test2015",
    f"testdev-*.parquet, in the folder or in its folder data, and test-*.parquet beside it or {TEST_QUESTIONS}",
)


def read(folder: epath.Path) -> list[Row]:
    """Reads the questions of the validation split, in the order of their file.

    Raises:
      FileNotFoundError, ValueError: files or images are missing or damaged; the message is one line that names them.
    """
    if questions := published.find(folder, VAL_QUESTIONS):
        return _read_official(folder, questions[0])
    if tables := published.find(folder, "validation-*.parquet", "data/validation-*.parquet"):
        path, columns = tables[0].parent, ["question_id", "question", "answers"]
        entries = published.read_parquet(tables, columns, ["image"], ["answer_type"])
        rows = [_answered(entry, entry["image"], entry, f"{path} row {i}") for i, entry in enumerate(entries)]
        return published.check_rows(rows, path)
    raise published.wrong_layout(folder, VAL_FILES)


def _read_official(folder: epath.Path, path: epath.Path) -> list[Row]:
    if not (answers := folder / VAL_ANSWERS).is_file():
        raise FileNotFoundError(f"{folder} lacks {VAL_ANSWERS}, which has the answers to {path.name}")
    annotations = {
        published.number(entry, "question_id", f"{answers} annotation {i}"): entry
        for i, entry in enumerate(published.read_objects(answers, "annotations"))
    }
    images = published.Images(folder, "val2014")
    rows = []
    for i, entry in enumerate(published.read_objects(path, "questions")):
        where = f"{path} question {i}"
        annotation = annotations.get(published.number(entry, "question_id", where))
        if annotation is None:
            raise ValueError(f"{where}: {VAL_ANSWERS} has no question_id {entry['question_id']}")
        rows.append(_answered(entry, _photo(images, "val2014", entry, where), annotation, where))
    images.check()
    return published.check_rows(rows, path)


def read_testdev(folder: epath.Path) -> list[Row]:
    """Reads the questions of test-dev, whose answers VQA's server has, in the order of their file.

    Raises:
      FileNotFoundError, ValueError: files or images are missing or damaged, or there is no list of the questions of
        test2015, all of which a submission holds; the message is one line that names them.
    """
    fields = {"folder": os.fspath(folder)}
    if found := published.find(folder, DEV_LLAVA, DEV_QUESTIONS):
        images = published.Images(folder, "test2015")
        rows = []
        for i, entry in enumerate(_questions(found[0])):
            where = f"{found[0]} question {i}"
            rows.append(_row(entry, _photo(images, "test2015", entry, where), where, None, fields))
        images.check()
    elif found := published.find(folder, "testdev-*.parquet", "data/testdev-*.parquet"):
        entries = published.read_parquet(found, ["question_id", "question"], ["image"])
        where = os.fspath(found[0].parent)
        rows = [_row(entry, entry["image"], f"{where} row {i}", None, fields) for i, entry in enumerate(entries)]
    else:
        raise published.wrong_layout(folder, DEV_FILES)
    known = set(map(str, _test_ids(folder)))
    if strange := next((row.id for row in rows if row.id not in known), None):
        raise ValueError(f"{found[0]}: the list of test2015 has no question_id {strange}: it is of another version")
    return published.check_rows(rows, found[0])


def _test_ids(folder: epath.Path) -> list[int]:
    """Returns question_id of each question of test2015, of which test-dev is a part."""
    if found := published.find(folder, TEST_LLAVA, TEST_QUESTIONS):
        entries = _questions(found[0])
    elif found := published.find(folder, "test-*.parquet", "data/test-*.parquet"):
        entries = published.read_parquet(found, ["question_id"])
    else:
        lists = f"{TEST_QUESTIONS} or {TEST_LLAVA}"
        raise FileNotFoundError(
            f"{folder} lacks the questions of test2015, all of which a submission holds: add {lists}"
        )
    return [published.number(entry, "question_id", os.fspath(found[0])) for entry in entries]


def _questions(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the questions of test2015 or test-dev from LLaVA's or the official file, with their image or image_id."""
    if path.suffix == ".json":
        return published.read_objects(path, "questions")
    return [
        {"question_id": question.id, "question": question.text, "image": question.image}
        for question in read_llava_questions(path)
    ]


def _photo(images: published.Images, split: str, entry: Mapping[str, Any], where: str) -> Picture:
    if "image" in entry:
        return images(published.text(entry, "image", where))
    return images(f"COCO_{split}_{published.number(entry, 'image_id', where):012d}.jpg")


def _row(
    entry: Mapping[str, Any],
    picture: Picture | None,
    where: str,
    references: tuple[str, ...] | None,
    fields: Mapping[str, Any] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Row:
    number, question = published.number(entry, "question_id", where), published.text(entry, "question", where)
    return Row(str(number), question, published.pictures_of([picture]), references, fields or {}, groups or {})


def _answered(entry: Mapping[str, Any], picture: Picture | None, annotation: Mapping[str, Any], where: str) -> Row:
    """Returns the row of a question with the annotation of its ten people."""
    answers = published.get(annotation, "answers", where)
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise ValueError(f"{where}: answers is {shown(answers)}, not a list of objects")
    if len(answers) != 10:
        raise ValueError(f"{where} has {len(answers)} answers, not 10")
    kind = annotation.get("answer_type")
    groups = {"answer_type": kind} if isinstance(kind, str) else {}
    references = tuple(published.text(answer, "answer", where) for answer in answers)
    return _row(entry, picture, where, references, groups=groups)


def submission(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns what VQA's server takes: an answer to every question of test2015, "" to those that were not asked.

    Answers are normalised, as by LLaVA's convert_vqav2_for_submission.py and lmms-eval 0.2.x; 0.7.3 sends them raw.
    """
    given = {result.row.id: normalise(result.answer) for result in results}
    folders = {result.row.fields["folder"] for result in results}
    return [
        {"question_id": number, "answer": given.get(str(number), "")}
        for folder in folders
        for number in _test_ids(epath.Path(folder))
    ]


def _score_lmms_eval_0_2(answer: str, row: Row) -> Mark:
    return Mark(vqa_accuracy.vqav2_lmms_eval_0_2(answer, row.references), normalise(answer) or None)


def _score_lmms_eval_0_7(answer: str, row: Row) -> Mark:
    return Mark(vqa_accuracy.vqav2_lmms_eval_0_7(answer, row.references), normalise_lightly(answer) or None)


_AS_THEY_STAND = "ten references that are the same are compared as they stand"
PAPER = Protocol(
    name="paper",
    version="lmms-eval 0.2.2",
    prompt=lambda row: ask_lmms_eval(row, row.question + SHORT_ANSWER),
    score=_score_lmms_eval_0_2,
    max_tokens=16,
    rule="soft accuracy of the normalised answer; " + _AS_THEY_STAND,
)
LLAVA = dataclasses.replace(  # LLaVA's scripts ask test-dev alone; on validation this is what the server would do
    PAPER,
    name="llava",
    version="LLaVA 2024-05",
    prompt=lambda row: ask_llava(row, row.question + SHORT_ANSWER),
    max_tokens=128,
    rule="VQA's own rule for the answer as LLaVA submits it, normalised: soft accuracy; " + _AS_THEY_STAND,
)
LMMS_EVAL = dataclasses.replace(
    PAPER,
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    score=_score_lmms_eval_0_7,
    rule="soft accuracy; punctuation, number words, articles and contractions are normalised on both sides",
)
SOURCE = "questions and answers: VQA's site; images: COCO's; LLaVA's file: its eval.zip; Hugging Face: lmms-lab/VQAv2"
BENCHMARKS = (
    Benchmark(
        name="vqav2",
        title="VQAv2, validation",
        read=read,
        protocols=(PAPER, LLAVA, LMMS_EVAL),
        metric="soft accuracy, %",
        size=214354,
        files=VAL_FILES,
        source=SOURCE,
        paper="VQAv2",
        in_domain=True,
    ),
    Benchmark(
        name="vqav2-testdev",
        title="VQAv2, test-dev",
        read=read_testdev,
        protocols=(PAPER, LLAVA, LMMS_EVAL),
        metric="none: VQA's server scores the submission",
        size=107394,
        files=DEV_FILES,
        source=SOURCE,
        in_domain=True,
        submission=submission,
    ),
)
