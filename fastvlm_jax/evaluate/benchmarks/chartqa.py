"""ChartQA: questions about charts, written by people and made of captions; scored by relaxed accuracy."""

from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import NO_LLAVA, Benchmark, Mark, Picture, Protocol, Row, ask_lmms_eval
from fastvlm_jax.evaluate.scores import relaxed_accuracy
from fastvlm_jax.text.conversation import Turn

TYPES = ("human", "augmented")
FILES = ("data/test-*.parquet", "test/test_human.json, test/test_augmented.json, test/png/ with the images")
# "ChartQA Dataset" is the folder in the published archive.
LISTS = tuple(f"{parent}test_human.json" for parent in ("", "test/", "ChartQA Dataset/test/"))


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions of the test split, those of people first, from the table of the hub or published lists."""
    if found := published.find(folder, "data/test-*.parquet", "test-*.parquet"):
        where = str(found[0].parent)
        rows = published.read_parquet(found, ("type", "question", "answer"), ("image",))
        return published.check_rows([_hub(row, f"{where} row {i}", i) for i, row in enumerate(rows)], where)
    if not (found := published.find(folder, *LISTS)):
        raise published.wrong_layout(folder, FILES)
    folder, rows = found[0].parent, []
    images = published.Images(folder, "png")
    for kind in TYPES:
        path = folder / f"test_{kind}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {path.name}: half of the questions are in it")
        for i, row in enumerate(published.read_json(path, list)):
            where = f"{path} row {i}"
            if not isinstance(row, dict):
                raise ValueError(f"{where} is no object: it is not the published file")
            question, answer = published.text(row, "query", where), published.text(row, "label", where)
            pictures = (images(published.text(row, "imgname", where)),)
            rows.append(_row(len(rows), question, answer, kind, pictures))
    images.check()
    return published.check_rows(rows, folder)


def _hub(row: dict[str, Any], where: str, number: int) -> Row:
    kind = published.text(row, "type", where).removesuffix("_test")
    if kind not in TYPES:
        raise ValueError(f"{where}: type is {shown(kind)}: the types are human_test and augmented_test")
    pictures = published.pictures_of([row["image"]])
    return _row(number, published.text(row, "question", where), published.text(row, "answer", where), kind, pictures)


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
        source="vis-nlp/ChartQA (GitHub); Hugging Face: lmms-lab/ChartQA",
        paper="ChartQA",
        in_domain=True,
        refused=NO_LLAVA,
    ),
)
