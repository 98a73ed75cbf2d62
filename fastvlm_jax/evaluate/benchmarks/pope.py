"""POPE: whether an object is in a photo of COCO; those that are not there are drawn in three ways, a split each.

The figure of LLaVA, and so of the paper, is the mean of the three F1. lmms-eval's task pools all questions.
"""

import dataclasses
import functools
from collections.abc import Sequence
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
from fastvlm_jax.evaluate.benchmarks.llava_questions import LlavaQuestion, read_llava_questions
from fastvlm_jax.evaluate.scores import pope

# Split -> number of its questions; later versions have 3,000 random ones.
SPLITS = {"adversarial": 3000, "popular": 3000, "random": 2910}
LLAVA = "llava_pope_test.jsonl"
# LLaVA's file counts the splits on: its question 10000007 is question 7 of random, 20000007 of popular.
LLAVA_IDS = 10_000_000
FILES = (
    "coco_pope_{adversarial,popular,random}.json, in the folder or in its folder coco, and COCO's images in the folder "
    f"val2014; if LLaVA's {LLAVA} is there, of the same version (2,910 random questions, not 3,000)",
    "Full/{adversarial,popular,random}-*.parquet, or test-*.parquet in the folder or in its folder data",
)


def read(folder: epath.Path, splits: Sequence[str] = tuple(SPLITS)) -> list[Row]:
    """Reads the questions of splits, one split after the other.

    Raises:
      FileNotFoundError, ValueError: files or images are missing or damaged, or the labels are of another version than
        LLaVA's questions; the message is one line that names them.
    """
    if published.find(folder, "coco/coco_pope_*.json", "coco_pope_*.json"):
        return _read_official(folder, splits)
    if published.find(folder, "Full/*.parquet"):
        tables = [table for split in splits for table in _of_split(folder, f"Full/{split}-*.parquet")]
    else:
        tables = published.find(folder, "test-*.parquet", "data/test-*.parquet")
    if not tables:
        raise published.wrong_layout(folder, FILES)
    columns = ["question_id", "question", "answer", "category"]
    rows = []
    for number, entry in enumerate(published.read_parquet(tables, columns, ["image"])):
        where = f"{tables[0].parent} row {number}"
        pictures = published.pictures_of([entry["image"]])
        rows.append(_row(entry["category"], entry["question_id"], entry["question"], entry["answer"], pictures, where))
    rows = [row for split in splits for row in rows if row.groups["category"] == split]
    return published.check_rows(rows, tables[0].parent)


def _of_split(folder: epath.Path, *patterns: str) -> list[epath.Path]:
    """Returns the files of a split; raises FileNotFoundError if there are none."""
    if found := published.find(folder, *patterns):
        return found
    raise FileNotFoundError(f"{folder} lacks {patterns[0]}, a split of POPE")


def _read_official(folder: epath.Path, splits: Sequence[str]) -> list[Row]:
    llava = [question for path in published.find(folder, LLAVA) for question in read_llava_questions(path)]
    images = published.Images(folder, "val2014")
    rows = []
    for split in splits:
        (path,) = _of_split(folder, f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json")
        labels = published.read_lines(path)
        if llava:
            _check_version(path, labels, [question for question in llava if question.category == split])
        for number, entry in enumerate(labels):
            where = f"{path} question {number}"
            key, text = published.get(entry, "question_id", where), published.get(entry, "text", where)
            picture = images(published.text(entry, "image", where))
            rows.append(_row(split, key, text, published.get(entry, "label", where), (picture,), where))
    images.check()
    return published.check_rows(rows, folder)


def _check_version(path: epath.Path, labels: Sequence[dict[str, Any]], llava: Sequence[LlavaQuestion]) -> None:
    """Raises ValueError if the labels are not those of LLaVA's questions, which its script pairs by line number."""
    mend = f"take the labels of POPE's commit e3e3926, or remove {LLAVA} to ask what the labels ask"
    if len(labels) != len(llava):
        counts = f"it has {len(labels):,} questions and {LLAVA} asks {len(llava):,} of them"
        raise ValueError(f"{path} is of another version than {LLAVA}: {counts}; {mend}")
    texts = {str(entry.get("question_id")): (entry.get("image"), entry.get("text")) for entry in labels}
    for question in llava:
        number = question.id % LLAVA_IDS if isinstance(question.id, int) else question.id
        if texts.get(str(number)) != (question.image, question.text):
            what = f"its question {number} is not {shown(question.text)} of {question.image}"
            raise ValueError(f"{path} is of another version than {LLAVA}: {what}; {mend}")


def _row(split: Any, key: Any, question: Any, label: Any, pictures: tuple[Picture, ...], where: str) -> Row:
    values = {"category": split, "question": question, "answer": label}
    split, question, label = (published.text(values, name, where) for name in values)
    label = label.strip().lower()
    if split not in SPLITS:
        raise ValueError(f"{where}: its category {shown(split)} is not {', '.join(SPLITS)}")
    if label not in ("yes", "no"):
        raise ValueError(f"{where}: its answer {shown(label)} is not yes or no")
    return Row(f"{split}/{key}", question, pictures, (label,), groups={"category": split})


def _score_llava(answer: str, row: Row) -> Mark:
    read = pope.llava(answer)
    return Mark(float(read == row.references[0]), read)


def _score_lmms_eval(answer: str, row: Row) -> Mark:
    read = pope.lmms_eval(answer)
    return Mark(float(read == row.references[0]), read)


def _counts(results: Sequence[Result]) -> dict[str, pope.Counts]:
    """Returns the counts of each split that the results are of."""
    pairs: dict[str, list[tuple[str | None, str]]] = {}
    for result in results:
        split = result.row.groups["category"]
        pairs.setdefault(split, []).append((result.mark.parsed, result.row.references[0]))
    return {split: pope.count(pairs[split]) for split in sorted(pairs)}


def mean_f1(results: Sequence[Result]) -> float:
    """Returns the mean of the F1 of the splits, percent."""
    counts = _counts(results).values()
    return 100 * sum(split.f1 for split in counts) / len(counts)


def pooled_f1(results: Sequence[Result]) -> float:
    """Returns the F1 of all questions together, percent."""
    return 100 * pope.count((result.mark.parsed, result.row.references[0]) for result in results).f1


def figures(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Returns F1, accuracy, precision, recall, share of "yes" (percent) and number of questions of each split."""
    return {split: _shares(counts) for split, counts in _counts(results).items()}


def figures_lmms_eval(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Returns the same of all questions and of each split, and lmms-eval's yes_ratio, that of the labels (percent)."""
    splits = _counts(results)
    whole = pope.Counts(*map(sum, zip(*splits.values(), strict=True)))
    return {
        name: _shares(counts) | {"yes_ratio": 100 * counts.yes_labels}
        for name, counts in {"all": whole, **splits}.items()
    }


def _shares(counts: pope.Counts) -> dict[str, float]:
    names = ("f1", "accuracy", "precision", "recall", "yes_share")
    return {name: 100 * getattr(counts, name) for name in names} | {"questions": counts.questions}


PAPER = Protocol(
    name="paper",
    version="LLaVA 2024-05",
    prompt=lambda row: ask_llava(row, row.question + SHORT_ANSWER),
    score=_score_llava,
    max_tokens=128,
    rule='"no" if No, no or not is a word before the first period, else "yes"; the mean of the F1 of the splits',
    aggregate=mean_f1,
    figures=figures,
)
LMMS_EVAL = Protocol(
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    prompt=lambda row: ask_lmms_eval(row, row.question.strip() + SHORT_ANSWER),
    score=_score_lmms_eval,
    max_tokens=128,
    rule='"yes" or "no" in any case and nothing else, other answers are wrong; the F1 of all questions together',
    aggregate=pooled_f1,
    figures=figures_lmms_eval,
)


def _benchmark(name: str, splits: Sequence[str], title: str, paper: str = "") -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        read=functools.partial(read, splits=splits),
        protocols=(PAPER, dataclasses.replace(PAPER, name="llava"), LMMS_EVAL),
        metric="F1, %",
        size=sum(SPLITS[split] for split in splits),
        files=FILES,
        source="labels: POPE's repository; images: COCO's; LLaVA's file: its eval.zip; Hugging Face: lmms-lab/POPE",
        paper=paper,
    )


BENCHMARKS = (
    _benchmark("pope", tuple(SPLITS), "POPE, all splits", "POPE"),
    *(_benchmark(f"pope-{split}", (split,), f"POPE, {split}") for split in SPLITS),
)
