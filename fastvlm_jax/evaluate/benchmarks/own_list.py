"""Reads one's own questions from a list: JSON lines, or a JSON file with a list, beside the images that it names.

{"image": "7.jpg", "question": "what is the total?", "answers": ["12.50", "$12.50"], "metric": "anls"}
{"images": ["a.jpg", "b.jpg"], "question": "<image> or <image>?", "choices": ["the first", "both"], "answer": "both"}

Names of images are relative to the folder of the list, or to a folder `images` in it. Marks `<image>` in a question
are its images, in order; without marks they come first. `answers` is a text, a number or a list of them, and may be
called `answer`; of a question with choices it is a choice or its letter. Also read are `id` and `category`.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import OPTION_LETTER, Picture, Row
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.exact_match import normalise
from fastvlm_jax.text.prompt import Prompt, place_images


def find_list(path: epath.Path) -> epath.Path | None:
    """Returns the list at a path: a file, or the only list of a folder; None if the folder holds none.

    Raises:
      ValueError: the file is no list, or the folder holds several.
    """
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise ValueError(f"{path} is no list of questions: expected is a .jsonl or .json file, or a folder")
        return path
    found = published.find(path, "*.jsonl") + published.find(path, "*.json") if path.is_dir() else []
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} lists, {found[0].name} and {found[1].name}: name the one to score")
    return found[0] if found else None


def read_list(path: epath.Path, metric: str | None, metrics: Mapping[str, Any]) -> list[Row]:
    """Returns the questions of a list; "turns" in their fields is what is asked, and "metric" how it is scored.

    Args:
      metric: metric of rows that name none; by default "choice" for questions with choices, else "exact".
      metrics: the known metrics, by name.

    Raises:
      ValueError, FileNotFoundError: a row lacks a key or holds another value, or an image is missing.
    """
    listed = published.read_lines(path) if path.suffix == ".jsonl" else published.read_json(path, list)
    images = published.Images(path.parent, ".", "images")
    rows = []
    for number, row in enumerate(listed):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object with question and answers")
        rows.append(_row(row, where, number, images, metric, metrics))
    images.check()
    return published.check_rows(rows, path, pictures=None)


def _row(
    row: dict[str, Any],
    where: str,
    number: int,
    images: published.Images,
    metric: str | None,
    metrics: Mapping[str, Any],
) -> Row:
    question, choices = published.text(row, "question", where), _choices(row, where)
    metric = row.get("metric") or metric or ("choice" if choices else "exact")
    if not isinstance(metric, str) or metric not in metrics:
        raise ValueError(f"{where}: metric is {str(metric)[:80]!r}: choose {', '.join(metrics)}")
    references = _references(row, where)
    if metric == "vqa" and len(references) != 10:
        raise ValueError(f"{where}: the metric vqa compares with 10 answers, not {len(references)}: choose exact or f1")
    if metric == "choice":
        if not choices:
            raise ValueError(f"{where} has no choices, which the metric choice needs")
        references = tuple(_letter(reference, choices, where) for reference in references)
    pictures = _pictures(row, where, images)
    asked = f"{question}\n{options.lines(choices)}{OPTION_LETTER}" if choices else question
    prompt = Prompt(where, (("user", asked),))
    turns = place_images(prompt, range(len(pictures)))
    groups = {"category": published.text(row, "category", where)} if row.get("category") is not None else {}
    fields = {"turns": turns, "metric": metric, "choices": choices}
    name = number if row.get("id") is None else row["id"]
    return Row(str(name), question, pictures, references, fields, groups)


def _choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    if row.get("choices") is None:
        return ()
    choices = options.read(row, "choices", where)
    if len(set(map(normalise, choices))) < len(choices):
        raise ValueError(f"{where}: two choices are the same text")
    return choices


def _pictures(row: dict[str, Any], where: str, images: published.Images) -> tuple[Picture, ...]:
    key = "images" if "images" in row else "image"
    if key not in row:
        return ()
    names = published.texts(row, key, where) if isinstance(row[key], list) else (published.text(row, key, where),)
    return tuple(images(name) for name in names)


def _references(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = published.get(row, "answer" if "answer" in row else "answers", where)
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(value) in (str, int, float) for value in values):
        raise ValueError(f"{where}: the answers are {str(value)[:80]!r}, not texts or numbers")
    return tuple(map(str, values))


def _letter(reference: str, choices: tuple[str, ...], where: str) -> str:
    """Returns the letter of a right answer, which is a choice or its letter."""
    alike = [normalise(choice) for choice in choices]
    if normalise(reference) in alike:
        return options.letters(choices)[alike.index(normalise(reference))]
    letter = reference.strip().upper()
    if len(letter) == 1 and letter in options.letters(choices):
        return letter
    raise ValueError(f"{where}: the answer {shown(reference)} is neither a choice nor its letter")
