"""CV-Bench: questions about counts and places in a picture (2D), depth and distance (3D), from three sets of images.

lmms-eval   image "\\nNote: You only need to respond with A, B without ...\\n\\nHow many organs? ...\\n(A) 3\\n(B) 2"

Its score is the plain mean of the questions, as in lmms-eval; the figure "mean_by_source" of the summary is the mean
that CV-Bench's authors take: of 2D the mean of ADE20K and COCO, of 3D Omni3D, of both the mean of the two.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from etils import epath

from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import NO_LLAVA, Benchmark, Picture, Protocol, Result, Row, ask_lmms_eval
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import cvbench as scores
from fastvlm_jax.text.conversation import Turn

COLUMNS = ("idx", "type", "task", "question", "choices", "answer", "prompt", "source")
NOTE = "Note: You only need to respond with {} without providing any additional information.\n\n"


def files_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the line of each layout of some of "2D" and "3D"."""
    names = [f"test_{kind.lower()}" for kind in kinds]
    return (
        f"{' and '.join(f'{name}.parquet' for name in names)}",
        f"{' and '.join(f'{name}.jsonl' for name in names)} and img/",
    )


def read(folder: epath.Path, kinds: Sequence[str]) -> list[Row]:
    """Reads the questions of some of "2D" and "3D", in this order."""
    rows = []
    for kind in kinds:
        tables = published.find(folder, f"test_{kind.lower()}.parquet")
        lists = published.find(folder, f"test_{kind.lower()}.jsonl")
        if not tables and not lists:
            raise published.wrong_layout(folder, files_of(kinds))
        rows += _read_parquet(tables) if tables else _read_lines(folder, lists[0])
    return published.check_rows(rows, folder)


def _read_parquet(paths: Sequence[epath.Path]) -> list[Row]:
    found = published.read_parquet(paths, COLUMNS, ("image",))
    return [_row(row, row["image"], f"{paths[0]} row {i}") for i, row in enumerate(found)]


def _read_lines(folder: epath.Path, path: epath.Path) -> list[Row]:
    images, rows = published.Images(folder, "."), []
    for i, line in enumerate(published.read_lines(path), 1):
        where = f"{path} line {i}"
        rows.append(_row(line, images(published.text(line, "filename", where)), where))
    images.check()
    return rows


def _row(values: dict[str, Any], picture: Picture | None, where: str) -> Row:
    choices = options.read(values, "choices", where)
    answer = {"answer": published.text(values, "answer", where).strip("()")}
    kind = published.text(values, "type", where)
    return Row(
        id=f"{kind}-{published.get(values, 'idx', where)}",  # each of the two counts from 0
        question=published.text(values, "question", where),
        pictures=published.pictures_of([picture]),
        references=(options.one_of(options.letters(choices), answer, "answer", where),),
        fields={"choices": choices, "prompt": published.text(values, "prompt", where)},
        groups={
            "type": kind,
            "task": published.text(values, "task", where),
            "source": published.text(values, "source", where),
        },
    )


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's tasks cv_bench, cv_bench_2d and cv_bench_3d."""
    return ask_lmms_eval(row, NOTE.format(", ".join(options.letters(row.fields["choices"]))) + row.fields["prompt"])


def figures(results: Sequence[Result]) -> dict[str, float]:
    """Returns the official mean, percent."""
    mean = scores.mean_by_source([r.mark.score for r in results], [r.row.groups["source"] for r in results])
    return {} if mean is None else {"mean_by_source": 100 * mean}


BOTH = Benchmark(
    name="cvbench",
    title="CV-Bench, 2D and 3D",
    read=functools.partial(read, kinds=("2D", "3D")),
    protocols=(
        Protocol(
            name="lmms-eval",
            version="lmms-eval 0.7.3",
            prompt=prompt,
            score=lambda answer, row: options.mark(scores.read(answer), row),
            max_tokens=1024,
            rule="the first letter, which only brackets and white space may precede; plain mean of the questions",
            figures=figures,
        ),
    ),
    metric="accuracy, %",
    size=2638,
    files=files_of(("2D", "3D")),
    source="Hugging Face: nyu-visionx/CV-Bench",
    refused=NO_LLAVA
    | {"paper": "the paper does not say which harness scored CV-Bench, and lmms-eval 0.2.2 has no task for it"},
)
BENCHMARKS = (
    BOTH,
    dataclasses.replace(
        BOTH,
        name="cvbench-2d",
        title="CV-Bench, 2D",
        read=functools.partial(read, kinds=("2D",)),
        size=1438,
        files=files_of(("2D",)),
        paper="CVB-2D",
    ),
    dataclasses.replace(
        BOTH,
        name="cvbench-3d",
        title="CV-Bench, 3D",
        read=functools.partial(read, kinds=("3D",)),
        size=1200,
        files=files_of(("3D",)),
        paper="CVB-3D",
    ),
)
