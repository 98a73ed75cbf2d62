"""OCRBench: 1,000 questions about text in images; an answer is right if it contains a reference."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import NO_LLAVA, Benchmark, Mark, Picture, Protocol, Result, Row, ask_lmms_eval
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import containment
from fastvlm_jax.evaluate.table import read_table
from fastvlm_jax.text.conversation import Turn

FILES = ("data/test-*.parquet", "OCRBench.tsv (VLMEvalKit)", "OCRBench/OCRBench.json, OCRBench_Images/ with the images")
FORMULAS = "HME100k"  # the data set whose answers are formulas
# Published type of a question -> the part of the benchmark that it counts in.
PARTS = {
    "Regular Text Recognition": "text recognition",
    "Irregular Text Recognition": "text recognition",
    "Artistic Text Recognition": "text recognition",
    "Handwriting Recognition": "text recognition",
    "Digit String Recognition": "text recognition",
    "Non-Semantic Text Recognition": "text recognition",
    "Scene Text-centric VQA": "scene text VQA",
    "Doc-oriented VQA": "document VQA",
    "Key Information Extraction": "key information extraction",
    "Handwritten Mathematical Expression Recognition": "handwritten formulas",
}


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions from the table of the hub or of VLMEvalKit, or from the published list."""
    if found := published.find(folder, "data/test-*.parquet", "test-*.parquet"):
        where = str(found[0].parent)
        rows = published.read_parquet(found, ("dataset", "question", "question_type", "answer"), ("image",))
        rows = [(row, published.pictures_of([row["image"]])) for row in rows]
    elif found := published.find(folder, "OCRBench.tsv"):
        where = str(found[0])
        listed = read_table(found[0], ("question", "answer", "category"), ("image",))
        rows = [
            (_tabled(row, f"{where} row {i}"), published.pictures_of([row["image"]])) for i, row in enumerate(listed)
        ]
    elif found := published.find(folder, "OCRBench/OCRBench.json", "OCRBench.json"):
        where = str(found[0])
        images = published.Images(folder, "OCRBench_Images", "OCRBench/OCRBench_Images")
        rows = [_listed(row, f"{where} row {i}", images) for i, row in enumerate(published.read_json(found[0], list))]
        images.check()
    else:
        raise published.wrong_layout(folder, FILES)
    rows = [_row(row, f"{where} row {i}", i, pictures) for i, (row, pictures) in enumerate(rows)]
    return published.check_rows(rows, where)


def _listed(row: Any, where: str, images: published.Images) -> tuple[dict[str, Any], tuple[Picture, ...]]:
    """Returns a row of the list with the names that the hub uses, and its image."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object: it is not the published file")
    answers = published.get(row, "answers", where)
    renamed = {
        "dataset": published.get(row, "dataset_name", where),
        "question": published.get(row, "question", where),
        "question_type": published.get(row, "type", where),
        "answer": [answers] if isinstance(answers, str) else answers,
    }
    return renamed, (images(published.text(row, "image_path", where)),)


def _tabled(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a row of VLMEvalKit's table with the names that the hub uses; it does not tell all data sets."""
    kind = row["category"]
    return {
        "dataset": FORMULAS if PARTS.get(kind) == "handwritten formulas" else "",
        "question": row["question"],
        "question_type": kind,
        "answer": options.parse(row["answer"], f"{where}: answer"),
    }


def _row(row: dict[str, Any], where: str, number: int, pictures: tuple[Picture, ...]) -> Row:
    kind = published.text(row, "question_type", where)
    if kind not in PARTS:
        raise ValueError(f"{where}: question_type is {shown(kind)}, which OCRBench does not have")
    fields = {"formula": published.text(row, "dataset", where) == FORMULAS}
    groups = {"part": PARTS[kind], "type": kind} | ({"dataset": row["dataset"]} if row["dataset"] else {})
    question, references = published.text(row, "question", where), published.texts(row, "answer", where)
    return Row(str(number), question, pictures, references, fields, groups)


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation: the question alone."""
    return ask_lmms_eval(row, row.question.strip())


def score(answer: str, row: Row, rule: Callable[[str, Sequence[str], bool], float]) -> Mark:
    """Returns whether an answer contains a reference."""
    return Mark(rule(answer, row.references, row.fields["formula"]), answer)


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the published sum, of 1,000, and that of each part: the number of right answers."""
    sums = dict.fromkeys(PARTS.values(), 0)
    for result in results:
        sums[result.row.groups["part"]] += int(result.mark.score)
    return {"sum": sum(sums.values()), "sums": sums}


BENCHMARKS = (
    Benchmark(
        name="ocrbench",
        title="OCRBench",
        read=read,
        protocols=tuple(
            Protocol(name, version, prompt, functools.partial(score, rule=rule), 128, line, figures=figures)
            for name, version, rule, line in (
                ("paper", "lmms-eval 0.2.2", containment.score_0_2, containment.RULE_0_2),
                ("lmms-eval", "lmms-eval 0.7.3", containment.score_0_7, containment.RULE_0_7),
            )
        ),
        metric="right answers, % (the published sum / 10)",
        size=1000,
        files=FILES,
        source="Yuliang-Liu/MultimodalOCR (GitHub); Hugging Face: echo840/OCRBench",
        paper="OCRBench",
        refused=NO_LLAVA,
    ),
)
