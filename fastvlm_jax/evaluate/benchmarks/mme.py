"""MME: two questions about each image, one to be answered with yes and one with no; 2,800 points.

A category has up to 200 points: 100 x the share of right answers + 100 x the share of images with both answers right.
"""

import collections
import functools
from collections.abc import Callable, Sequence
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
from fastvlm_jax.evaluate.scores import yes_no_start
from fastvlm_jax.evaluate.table import read_table
from fastvlm_jax.files import read_small
from fastvlm_jax.text.conversation import Turn

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)
ENDING = " Please answer yes or no."
ROOTS = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version")
FILES = (
    "data/test-*.parquet",
    "MME.tsv (VLMEvalKit)",
    "MME_Benchmark_release_version/ with a folder for each category, of images and texts of the same name",
)


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions from the table of the hub or of VLMEvalKit, or from the published folders, by name."""
    if found := published.find(folder, "data/test-*.parquet", "test-*.parquet"):
        where = str(found[0].parent)
        listed = published.read_parquet(found, ("question_id", "question", "answer", "category"), ("image",))
        asked = [(row, f"{where} row {i}", published.pictures_of([row["image"]])) for i, row in enumerate(listed)]
    elif tables := published.find(folder, "MME.tsv"):
        where = str(tables[0])
        listed = read_table(tables[0], ("image_path", "question", "answer", "category"), ("image",))
        asked = [
            (row | {"question_id": row["image_path"]}, f"{where} row {i}", published.pictures_of([row["image"]]))
            for i, row in enumerate(listed)
        ]
    else:
        root = next((folder / name for name in ROOTS if (folder / name).is_dir()), folder)
        where = str(root)
        found = published.find(root, "*/*.txt"), published.find(root, "*/questions_answers_YN/*.txt")
        asked = _published(root, [path for paths in found for path in paths if _category(root, path) in CATEGORIES])
        if not asked:
            raise published.wrong_layout(folder, FILES)
    count: collections.Counter[str] = collections.Counter()
    rows = []
    for row, place, pictures in asked:
        image = published.text(row, "question_id", place)
        count[image] += 1
        rows.append(_row(row, place, image, count[image], pictures))
    for image, questions in count.items():
        if questions != 2:
            raise ValueError(f"{where}: the image {shown(image)} has {questions} questions: MME asks 2 of each")
    return published.check_rows(rows, where)


def _published(root: epath.Path, paths: list[epath.Path]) -> list[tuple[dict[str, Any], str, tuple[Picture, ...]]]:
    """Returns (row with the names that the hub uses, where it lies, its image) of each line of the texts."""
    images, asked = published.Images(root, "."), []
    for path in sorted(paths):
        category = _category(root, path)
        parent = path.parent if path.parent.name == category else path.parent.parent / "images"
        named = [parent / f"{path.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
        image = next((name for name in named if name.is_file()), named[0])
        try:
            lines = read_small(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 (at its byte {error.start})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            question, tab, answer = line.partition("\t")
            if not tab:
                raise ValueError(f"{path} line {number} has no tab between question and answer")
            row = {"question_id": f"{category}/{image.name}", "question": question, "answer": answer}
            pictures = (images(str(image.relative_to(root))),)
            asked.append((row | {"category": category}, f"{path} line {number}", pictures))
    images.check()
    return asked


def _category(root: epath.Path, path: epath.Path) -> str:
    return path.relative_to(root).parts[0]


def _row(row: dict[str, Any], where: str, image: str, number: int, pictures: tuple[Picture, ...]) -> Row:
    category, answer = published.text(row, "category", where), published.text(row, "answer", where)
    reference = answer.lower().strip().replace(".", "")
    if category not in CATEGORIES:
        raise ValueError(f"{where}: category is {shown(category)}, which MME does not have")
    if reference not in ("yes", "no"):
        raise ValueError(f"{where}: answer is {shown(answer)}, not Yes or No")
    part = "perception" if category in PERCEPTION else "cognition"
    question = published.text(row, "question", where)
    return Row(
        f"{image}#{number}", question, pictures, (reference,), {"image": image}, {"part": part, "category": category}
    )


def _asked(row: Row) -> str:
    return row.question.strip().replace(ENDING, "") + SHORT_ANSWER


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval: the question with LLaVA's sentence in place of its own."""
    return ask_lmms_eval(row, _asked(row))


def llava_prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of LLaVA's script, which has the same text."""
    return ask_llava(row, _asked(row))


def score(answer: str, row: Row, parse: Callable[[str], str | None]) -> Mark:
    """Returns whether an answer is the right one of yes and no."""
    parsed = parse(answer)
    return Mark(float(parsed == row.references[0]), parsed)


def points(results: Sequence[Result]) -> dict[str, float]:
    """Returns the points of each category, 0 to 200, over the images of which both questions were asked."""
    images: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for result in results:
        images[result.row.groups["category"], result.row.fields["image"]].append(result.mark.score)
    found: dict[str, list[float]] = collections.defaultdict(list)
    for (category, _), scores in images.items():
        if len(scores) == 2:
            found[category].append(50 * sum(scores) + 100 * (sum(scores) == 2))
    return {category: sum(scores) / len(scores) for category, scores in found.items()}


def total(results: Sequence[Result]) -> float:
    """Returns the points of all categories, 0 to 2,800."""
    return sum(points(results).values())


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the points of the parts and categories, and how many images count for nothing for want of a question."""
    found = points(results)
    images = collections.Counter(result.row.fields["image"] for result in results)
    return {
        "perception": sum(found.get(category, 0.0) for category in PERCEPTION),
        "cognition": sum(found.get(category, 0.0) for category in COGNITION),
        "points": {category: found[category] for category in CATEGORIES if category in found},
        "images_asked_once": sum(count == 1 for count in images.values()),
    }


def _protocol(name: str, version: str, ask: Callable[[Row], tuple[Turn, ...]], max_tokens: int) -> Protocol:
    own = name == "llava"
    return Protocol(
        name=name,
        version=version,
        prompt=ask,
        score=functools.partial(score, parse=yes_no_start.parse_mme if own else yes_no_start.parse_lmms_eval),
        max_tokens=max_tokens,
        rule=yes_no_start.MME_RULE if own else yes_no_start.LMMS_EVAL_RULE,
        aggregate=total,
        figures=figures,
    )


BENCHMARKS = (
    Benchmark(
        name="mme",
        title="MME",
        read=read,
        protocols=(
            _protocol("paper", "lmms-eval 0.2.2", prompt, 16),
            _protocol("llava", "LLaVA 2024-05", llava_prompt, 128),
            _protocol("lmms-eval", "lmms-eval 0.7.3", prompt, 16),
        ),
        metric="points of 2,800",
        size=2374,
        files=FILES,
        source="the authors of MME, by their form; Hugging Face: lmms-lab/MME",
    ),
)
