"""ScienceQA: questions of school exams with two to five options, about an image or about text alone.

paper, llava    image "\\nContext: N/A\\nQuestion: Which?\\nOptions: (A) leaf (B) frog\\nAnswer with the option's ..."
lmms-eval       image "\\nWhich?\\nA. leaf\\nB. frog\\nAnswer with the ..."   "Context: HINT\\n" only if there is a hint
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import OPTION_LETTER, Benchmark, Picture, Protocol, Row, ask_llava, ask_lmms_eval
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import scienceqa as scores
from fastvlm_jax.text.conversation import Turn

FILES = (
    "problems.json, pid_splits.json and images/test/ID/image.png (official; LLaVA's folder has them too)",
    "ScienceQA-FULL/test-*.parquet, ScienceQA-IMG/test-*.parquet or data/test-*.parquet",
)
COLUMNS = ("question", "choices", "answer", "hint", "subject", "grade")


def read(folder: epath.Path) -> list[Row]:
    """Reads all questions of the test split, with and without image."""
    if published.find(folder, "problems.json"):
        return _read_official(folder)
    paths = published.find(folder, "ScienceQA-FULL/test-*.parquet", "data/test-*.parquet", "test-*.parquet")
    if not paths:
        raise published.wrong_layout(folder, FILES)
    rows = _read_hub(paths)
    if all(row.pictures for row in rows):
        raise ValueError(
            f"{paths[0]}: every row has an image: it is ScienceQA-IMG, which --benchmark=scienceqa-img reads"
        )
    return rows


def read_images(folder: epath.Path) -> list[Row]:
    """Reads the questions of the test split that have an image."""
    paths = published.find(folder, "ScienceQA-IMG/test-*.parquet", "test-*.parquet")
    rows = _read_hub(paths) if paths else read(folder)
    return published.check_rows([row for row in rows if row.pictures], folder)


def _read_official(folder: epath.Path) -> list[Row]:
    problems = published.read_json(folder / "problems.json")
    splits = published.read_json(folder / "pid_splits.json")
    test = published.texts(splits, "test", f"{folder / 'pid_splits.json'}")
    images = published.Images(folder, "images/test", "test")
    rows = []
    for identity in test:
        problem = published.get(problems, identity, f"{folder / 'problems.json'}")
        where = f"{folder / 'problems.json'}, {identity}"
        name = published.get(problem, "image", where)
        picture = images(f"{identity}/{name}") if name else None
        rows.append(_row(identity, problem, picture, where))
    images.check()
    return published.check_rows(rows, folder, pictures=None)


def _read_hub(paths: Iterable[epath.Path]) -> list[Row]:
    found = published.read_parquet(paths, COLUMNS, ("image",))
    rows = [_row(str(i), row, row["image"], f"{paths[0].parent} row {i}") for i, row in enumerate(found)]
    return published.check_rows(rows, paths[0].parent, pictures=None)


def _row(identity: str, values: dict[str, Any], picture: Picture | None, where: str) -> Row:
    choices = options.read(values, "choices", where)
    return Row(
        id=identity,
        question=published.text(values, "question", where),
        pictures=published.pictures_of([picture]),
        references=(options.letter(published.get(values, "answer", where), choices, f"{where}: answer"),),
        fields={"choices": choices, "hint": str(published.get(values, "hint", where) or "")},
        groups={
            "subject": published.text(values, "subject", where),
            "grade": published.text(values, "grade", where),
            "context": "image" if picture else "text alone",
        },
    )


def prompt_llava(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of LLaVA's model_vqa_science.py, on the file of its convert_sqa_to_llava.py (CQM-A)."""
    choices = " ".join(f"({letter}) {option}" for letter, option in options.lettered(row.fields["choices"]))
    text = f"Context: {row.fields['hint'].strip() or 'N/A'}\nQuestion: {row.question}\nOptions: {choices}"
    return ask_llava(row, f"{text.replace('  ', ' ').strip()}{OPTION_LETTER}")


def prompt_lmms_eval(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's tasks scienceqa and scienceqa_img."""
    hint = f"Context: {row.fields['hint']}\n" if row.fields["hint"] else ""
    return ask_lmms_eval(row, hint + options.question(row))


LLAVA = Protocol(
    name="llava",
    version="LLaVA 2024-05",
    prompt=prompt_llava,
    score=options.marker(scores.read_llava),
    max_tokens=1024,
    rule='the letter alone, before ". ", or in one sentence "The answer is X."; capitals only',
)
PROTOCOLS = (
    dataclasses.replace(LLAVA, name="paper"),
    LLAVA,
    Protocol(
        name="lmms-eval",
        version="lmms-eval 0.7.3",
        prompt=prompt_lmms_eval,
        score=options.marker(scores.read_lmms_eval_0_7),
        max_tokens=16,
        rule='the letter alone, in either case, or a capital before a full stop: "B."',
    ),
)
ALL = Benchmark(
    name="scienceqa",
    title="ScienceQA, test",
    read=read,
    protocols=PROTOCOLS,
    metric="accuracy, %",
    size=4241,
    files=FILES,
    source="the ScienceQA repository and its images test.zip; Hugging Face: lmms-lab/ScienceQA, ScienceQA-FULL",
    paper="SQA",
    in_domain=True,
)
BENCHMARKS = (
    ALL,
    dataclasses.replace(
        ALL,
        name="scienceqa-img",
        title="ScienceQA-IMG, the questions of the test split with an image",
        read=read_images,
        size=2017,
        source="the ScienceQA repository and its images test.zip; Hugging Face: lmms-lab/ScienceQA, ScienceQA-IMG",
        paper="",
    ),
)
