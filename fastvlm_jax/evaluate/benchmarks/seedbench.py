"""SEED-Bench: questions with four options about images, and about videos, of which frames are asked.

image "\\nHow many towels are in the image?\\nA. One\\nB. Two\\nC. Three\\nD. Four\\nAnswer with the option's ..."

The official files, as LLaVA uses them, give of a video the frame in its middle; the hub's give several frames, which
are all asked. So the two layouts hold the same questions, but not the same images of the videos.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Result, Row, ask_llava, ask_lmms_eval
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import seedbench as scores
from fastvlm_jax.text.conversation import Turn

QUESTIONS, PROMPTS = "SEED-Bench.json", "llava-seed-bench.jsonl"
FILES = (
    f"{QUESTIONS} and SEED-Bench-image/DATA_ID; for videos {PROMPTS} and the frames that it names (official, LLaVA)",
    "data/test-*.parquet",
)
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
COLUMNS = ("question_id", "question", "answer", "data_type", "question_type_id", *CHOICES)
# Of the official file's question_type, which the hub's files lack.
TYPES = {
    "1": "Scene Understanding", "2": "Instance Identity", "3": "Instance Attributes", "4": "Instance Location",
    "5": "Instances Counting", "6": "Spatial Relation", "7": "Instance Interaction", "8": "Visual Reasoning",
    "9": "Text Understanding", "10": "Action Recognition", "11": "Action Prediction", "12": "Procedure Understanding",
}  # fmt: skip


def read(folder: epath.Path) -> list[Row]:
    """Reads the questions about images and about videos."""
    return _read(folder, ("image", "video"))


def read_images(folder: epath.Path) -> list[Row]:
    """Reads the questions about images."""
    return _read(folder, ("image",))


def _read(folder: epath.Path, kinds: Sequence[str]) -> list[Row]:
    if published.find(folder, QUESTIONS):
        return published.check_rows(_read_official(folder, kinds), folder)
    paths = published.find(folder, "data/test-*.parquet", "test-*.parquet")
    if not paths:
        raise published.wrong_layout(folder, FILES)
    rows = published.read_parquet(paths, COLUMNS, ("image",))
    found = [_row(row, row["image"], f"{folder} row {i}") for i, row in enumerate(rows) if row["data_type"] in kinds]
    return published.check_rows(found, folder)


def _read_official(folder: epath.Path, kinds: Sequence[str]) -> list[Row]:
    path = folder / QUESTIONS
    images = published.Images(folder, ".")
    frames = _frames(folder) if "video" in kinds else {}
    rows = []
    for i, question in enumerate(published.read_objects(path, "questions")):
        where = f"{path} question {i}"
        for name in (*COLUMNS, "data_id"):
            published.get(question, name, where)
        kind, identity = question["data_type"], str(question["question_id"])
        if kind not in kinds:
            continue
        if kind == "video" and identity not in frames:
            raise ValueError(f"{folder / PROMPTS} names no frame of {where}")
        name = frames[identity] if kind == "video" else f"SEED-Bench-image/{question['data_id']}"
        rows.append(_row(question, (images(name),), where))
    images.check()
    return rows


def _frames(folder: epath.Path) -> dict[str, str]:
    """Returns question id -> image, of LLaVA's question file."""
    path = folder / PROMPTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} lacks {PROMPTS}, which names the frames of the videos: --benchmark=seedbench-image needs none"
        )
    frames = {}
    for i, line in enumerate(published.read_lines(path), 1):
        where = f"{path} line {i}"
        frames[str(published.get(line, "question_id", where))] = published.text(line, "image", where)
    return frames


def _row(values: dict[str, Any], pictures: Sequence[Picture], where: str) -> Row:
    kind = str(values["question_type_id"])
    return Row(
        id=str(values["question_id"]),
        question=published.text(values, "question", where),
        pictures=published.pictures_of(pictures or ()),
        references=(options.one_of("ABCD", values, "answer", where),),
        fields={"choices": tuple(str(published.get(values, name, where)) for name in CHOICES)},
        groups={"type": TYPES.get(kind, f"type {kind}"), "data": values["data_type"]},
    )


def prompt_llava(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of LLaVA's model_vqa_loader.py on llava-seed-bench.jsonl: one image."""
    return ask_llava(row, options.question(row))


def prompt_lmms_eval(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task seedbench: all images."""
    return ask_lmms_eval(row, options.question(row))


def submission(results: Sequence[Result]) -> list[dict[str, str]]:
    """Returns the lines of the leaderboard's file."""
    return [{"question_id": result.row.id, "prediction": result.answer} for result in results]


LMMS_EVAL = Protocol(
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    prompt=prompt_lmms_eval,
    score=options.marker(scores.read_lmms_eval),
    max_tokens=1024,
    rule="the first sign of the answer is the option's letter, in either case",
)
ALL = Benchmark(
    name="seedbench",
    title="SEED-Bench, images and videos",
    read=read,
    protocols=(
        dataclasses.replace(LMMS_EVAL, name="paper", version="lmms-eval 0.2.2"),
        Protocol(
            name="llava",
            version="LLaVA 2024-05",
            prompt=prompt_llava,
            score=options.marker(scores.read_llava),
            max_tokens=128,
            rule="the whole answer is the option's letter, a capital",
        ),
        LMMS_EVAL,
    ),
    metric="accuracy, %",
    size=17990,
    files=FILES,
    source="AILab-CVC/SEED-Bench (GitHub); LLaVA's file: its eval.zip; Hugging Face: lmms-lab/SEED-Bench",
    paper="Seed-all",
    submission=submission,
)
BENCHMARKS = (
    ALL,
    dataclasses.replace(
        ALL, name="seedbench-image", title="SEED-Bench, images", read=read_images, size=14233, paper="SeedI"
    ),
)
