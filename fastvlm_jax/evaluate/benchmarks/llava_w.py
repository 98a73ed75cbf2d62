"""LLaVA-Bench in the Wild: open questions about 24 images, whose answers a judge compares with GPT-4's."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published, reviews
from fastvlm_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Result, Row, ask_llava, ask_lmms_eval
from fastvlm_jax.evaluate.scores import judge_replies
from fastvlm_jax.evaluate.standard_error import StandardError, of_aggregate

FILES = (
    "questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/",
    "data/train-*.parquet",
)
CATEGORIES = ("conv", "detail", "complex")
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
# The published instruction to the judge, the same for the three categories (LLaVA llava/eval/table/rule.json).
INSTRUCTION = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, "
    "accuracy, level of details of their responses. Each assistant receives an overall score on a scale of 1 to 10, "
    "where a higher score indicates better overall performance.\nPlease first output a single line containing only two "
    "values indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn "
    "the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias "
    "and ensuring that the order in which the responses were presented does not affect your judgment."
)


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions; references are GPT-4's answers, "caption" in their fields is what the judge is told."""
    if paths := published.find(folder, "data/train-*.parquet", "train-*.parquet"):
        columns = ("question_id", "question", "category", "gpt_answer", "caption")
        found = published.read_parquet(paths, columns, pictures=("image",))
        rows = [_row(row, row["image"], f"{folder} row {i}") for i, row in enumerate(found)]
        return published.check_rows(rows, folder)
    if paths := published.find(folder, "questions.jsonl", "llava-bench-in-the-wild/questions.jsonl"):
        return published.check_rows(_official(paths[0]), paths[0])
    raise published.wrong_layout(folder, FILES)


def _official(path: epath.Path) -> list[Row]:
    """Returns the rows of a list of questions, joined with its captions by image and with the answers by question."""
    contexts = _by_key(path.parent / "context.jsonl", "image")
    answers = _by_key(path.parent / "answers_gpt4.jsonl", "question_id")
    images, rows = published.Images(path.parent, "images"), []
    for number, line in enumerate(published.read_lines(path), 1):
        where = f"{path} line {number}"
        image, question = published.text(line, "image", where), published.text(line, "text", where)
        context = _joined(contexts, line, "image", where, "context.jsonl")
        answer = _joined(answers, line, "question_id", where, "answers_gpt4.jsonl")
        caption = published.get(context, "caption", f"context.jsonl, {shown(image)},")
        answer = published.text(answer, "text", f"answers_gpt4.jsonl, question {shown(line['question_id'])},")
        whole = {**line, "question": question, "caption": caption, "gpt_answer": answer}
        rows.append(_row(whole, images(image), where))
    images.check()
    return rows


def _by_key(path: epath.Path, key: str) -> dict[str, dict[str, Any]]:
    """Returns the lines of a file by their value of `key`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: expected are {FILES[0]}")
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(published.read_lines(path), 1):
        name = str(published.get(line, key, f"{path} line {number}"))
        if name in found:
            raise ValueError(f"{path} line {number}: the {key} {shown(name)} stands twice")
        found[name] = line
    return found


def _joined(found: Mapping[str, dict], line: Mapping[str, Any], key: str, where: str, other: str) -> dict[str, Any]:
    name = str(published.get(line, key, where))
    if name not in found:
        raise ValueError(f"{where}: {other} has no {key} {shown(name)}")
    return found[name]


def _row(row: Mapping[str, Any], picture: Picture | None, where: str) -> Row:
    category, caption = published.text(row, "category", where), published.get(row, "caption", where)
    if category not in CATEGORIES:
        raise ValueError(f"{where}: its category is {shown(category)}, not {' or '.join(CATEGORIES)}")
    if isinstance(caption, list) and all(isinstance(line, str) for line in caption):
        caption = "\n".join(caption)
    if not isinstance(caption, str):
        raise ValueError(f"{where}: its caption is no text")
    return Row(
        id=str(published.get(row, "question_id", where)),
        question=published.text(row, "question", where),
        pictures=published.pictures_of([picture]),
        references=(published.text(row, "gpt_answer", where),),
        fields={"caption": caption},
        groups={"category": category},
    )


def judge_prompt(row: Row, answer: str) -> str:
    """Returns what the judge is asked about an answer, as LLaVA and lmms-eval write it."""
    return (
        f"[Context]\n{row.fields['caption']}\n\n[Question]\n{row.question}\n\n"
        f"[Assistant 1]\n{row.references[0]}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{INSTRUCTION}\n\n"
    )


class Judge(NamedTuple):
    """Describes how a harness asks its judge.

    Attributes:
      model: name of the judge.
      system: its system message; None for none.
      temperature: its temperature.
      rule: reads the two scores in a reply.
    """

    model: str
    system: str | None
    temperature: float
    rule: Callable[[str], tuple[float, float] | None]

    def ask(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Returns the requests of the judge about answers, a line each."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [
            {
                "question_id": result.row.id,
                "category": f"llava_bench_{result.row.groups['category']}",
                "model": self.model,
                "messages": [*opening, {"role": "user", "content": judge_prompt(result.row, result.answer)}],
                "temperature": self.temperature,
                "max_tokens": 1024,
            }
            for result in results
        ]

    def parse(self, line: Mapping[str, Any]) -> tuple[float, float] | None:
        """Returns the two scores in a line of a review: of LLaVA's script in its "tuple", else of its "content"."""
        scores = line.get("tuple")
        if isinstance(scores, list) and len(scores) == 2:
            return judge_replies.pair(f"{scores[0]} {scores[1]}")
        return self.rule(reviews.text_of(line))

    def review(self, lines: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
        """Returns the scores of a review; see reviews.summarise_review."""
        kinds = {"category": lambda row: (row.groups["category"],)}
        return reviews.summarise_review(lines, rows, self.parse, scores_of, kinds)


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Returns 100 times the mean score of the answers over that of the references; nan if the latter is 0."""
    reference, answer = np.asarray(pairs, np.float64).sum(0)
    return 100 * answer / reference if reference else math.nan


def scores_of(pairs: Sequence[tuple[float, float]], clusters: np.ndarray) -> tuple[dict[str, float], StandardError]:
    """Returns {"score", "reference", "answer"}, the last two in points of 100, and the standard error of the score."""
    reference, answer = 10 * np.asarray(pairs, np.float64).mean(0)
    figures = {"score": ratio(pairs), "reference": float(reference), "answer": float(answer)}
    return figures, of_aggregate(pairs, clusters, ratio)


def _protocol(name: str, version: str, ask: Callable, max_tokens: int, judge: Judge) -> Protocol:
    return Protocol(
        name=name,
        version=version,
        prompt=lambda row: ask(row, row.question),
        score=None,
        max_tokens=max_tokens,
        rule=f"{judge.model} gives GPT-4's answer and this one 1 to 10 points; mean of these over mean of those",
        judge=judge.ask,
        review=judge.review,
    )


LLAVA = "LLaVA 2024-05"
BENCHMARKS = (
    Benchmark(
        name="llava-w",
        title="LLaVA-Bench in the Wild",
        read=read,
        protocols=(
            _protocol("paper", LLAVA, ask_llava, 1024, Judge("gpt-4-0613", SYSTEM, 0.2, judge_replies.pair)),
            _protocol("llava", LLAVA, ask_llava, 1024, Judge("gpt-4-0314", SYSTEM, 0.2, judge_replies.pair)),
            _protocol(
                "lmms-eval", "lmms-eval 0.7.3", ask_lmms_eval, 4096,
                Judge("gpt-4o-2024-11-20", None, 0.0, judge_replies.first_pair),
            ),
        ),
        metric="judge's points, % of GPT-4's",
        size=60,
        files=FILES,
        source="Hugging Face: liuhaotian/llava-bench-in-the-wild; lmms-lab/llava-bench-in-the-wild (Parquet)",
        paper="LLaVA-W",
    ),
)  # fmt: skip
