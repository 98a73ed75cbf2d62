"""MM-Vet: open questions that need several capabilities at once, whose answers a judge grades from 0 to 1."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published, reviews
from fastvlm_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Result, Row, ask_llava, ask_lmms_eval
from fastvlm_jax.evaluate.scores import judge_replies
from fastvlm_jax.evaluate.standard_error import StandardError, of_mean

FILES = (
    "mm-vet.json and images/ (or llava-mm-vet.jsonl and images/, without answers for a judge)",
    "data/test-*.parquet",
)
# What lmms-eval puts before a question (tasks/mmvet/mmvet.yaml).
THINK = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
_MEME = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite "
    "its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. "
    "The meme is saying that the person has trust issues because the names of these countries do not accurately "
    "represent their landscapes."
)
# The published prompt of the judge: its instruction and seven graded examples (lmms-eval tasks/mmvet/utils.py).
_EXAMPLES = (
    ("What is x in the equation?", "-1 <AND> -5", "x = 3", "0.0"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5 or 5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1 or x = -5", "1.0"),
    (
        "Can you explain this meme?",
        _MEME,
        "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very "
        "icy and Greenland isn't very green.",
        "0.4",
    ),
    (
        "Can you explain this meme?",
        _MEME,
        "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
        "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This "
        "is why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or "
        "confusion. The humor in this meme is derived from the unexpected contrast between the names of the countries "
        "and their actual physical characteristics.",
        "1.0",
    ),
)
INSTRUCTION = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n"
    "gpt_query_prompt | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
) + "".join(" | ".join(example) + "\n" for example in _EXAMPLES)


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions; their references are public in all layouts but LLaVA's."""
    if paths := published.find(folder, "data/test-*.parquet", "test-*.parquet"):
        found = published.read_parquet(paths, ("question_id", "question", "answer", "capability"), pictures=("image",))
        rows = []
        for number, row in enumerate(found):
            where = f"{folder} row {number}"
            capabilities = published.text(row, "capability", where).split(",")
            rows.append(_row(published.text(row, "question_id", where), row, row["image"], capabilities, where))
        return published.check_rows(rows, folder)
    for name, rows_of in (("mm-vet.json", _official), ("llava-mm-vet.jsonl", _llava)):
        if paths := published.find(folder, name, f"mm-vet/{name}"):  # the published archive holds a folder mm-vet
            return published.check_rows(rows_of(paths[0]), paths[0])
    raise published.wrong_layout(folder, FILES)


def _official(path: epath.Path) -> list[Row]:
    images, rows = published.Images(path.parent, "images"), []
    for name, row in published.read_json(path).items():
        where = f"{path}: {shown(name)}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object")
        capabilities = published.get(row, "capability", where)
        if not isinstance(capabilities, list) or not all(isinstance(part, str) for part in capabilities):
            raise ValueError(f"{where}: its capability is no list of texts")
        rows.append(_row(name, row, images(published.text(row, "imagename", where)), capabilities, where))
    images.check()
    return rows


def _llava(path: epath.Path) -> list[Row]:
    images, rows = published.Images(path.parent, "images"), []
    for number, line in enumerate(published.read_lines(path), 1):
        where = f"{path} line {number}"
        name = f"v1_{str(published.get(line, 'question_id', where)).removeprefix('v1_')}"
        rows.append(
            Row(name, published.text(line, "text", where), (images(published.text(line, "image", where)),), None)
        )
    images.check()
    return rows


def _row(name: str, row: Mapping[str, Any], picture: Picture | None, capabilities: Sequence[str], where: str) -> Row:
    names = tuple(sorted(part.strip() for part in capabilities))
    return Row(
        id=name,
        question=published.text(row, "question", where),
        pictures=published.pictures_of([picture]),
        references=(published.text(row, "answer", where),),
        fields={"capabilities": names},
        groups={"capabilities": ", ".join(names)},
    )


def judge_prompt(row: Row, answer: str) -> str:
    """Returns what the judge is asked about an answer, as lmms-eval writes it."""
    reference = row.references[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{INSTRUCTION}\n{row.question} | {reference} | {answer} |"


def _judge(model: str) -> Callable[[Sequence[Result]], list[dict[str, Any]]]:
    def ask(results: Sequence[Result]) -> list[dict[str, Any]]:
        return [
            {
                "question_id": result.row.id,
                "model": model,
                "messages": [{"role": "user", "content": judge_prompt(result.row, result.answer)}],
                "temperature": 0.0,
                "max_tokens": 128,
            }
            for result in results
            if result.row.references is not None
        ]

    return ask


def review(lines: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the scores of a review: 100 times the mean, also for each capability and exact combination of them."""
    kinds = {
        "capability": lambda row: row.fields.get("capabilities", ()),
        "capabilities": lambda row: tuple(row.groups.values()),
    }
    return reviews.summarise_review(lines, rows, _parse, _scores, kinds)


def _parse(line: Mapping[str, Any]) -> float | None:
    """Returns the score in a line of a review: its "score", else that of the reply in its "content"."""
    score = line.get("score")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    return judge_replies.share(str(score) if is_number else reviews.text_of(line))


def _scores(shares: Sequence[float], clusters: np.ndarray) -> tuple[dict[str, float], StandardError]:
    points = 100 * np.asarray(shares, np.float64)
    return {"score": float(points.mean())}, of_mean(points, clusters)


def submission(results: Sequence[Result]) -> dict[str, str]:
    """Returns what MM-Vet's server takes: the answer of each question by its id, as LLaVA's script writes it."""
    return {result.row.id: result.answer for result in results}


def _protocol(name: str, version: str, prompt: Callable, judge: str) -> Protocol:
    return Protocol(
        name=name,
        version=version,
        prompt=prompt,
        score=None,
        max_tokens=1024,
        rule=f"{judge} grades the answer from 0 to 1; mean",
        judge=_judge(judge),
        review=review,
    )


def _think(row: Row):
    return ask_lmms_eval(row, THINK + row.question)


BENCHMARKS = (
    Benchmark(
        name="mm-vet",
        title="MM-Vet",
        read=read,
        protocols=(
            _protocol("paper", "lmms-eval 0.2.2", _think, "gpt-4-0613"),
            _protocol("llava", "LLaVA 2024-05", lambda row: ask_llava(row, row.question), "gpt-4-0613"),
            _protocol("lmms-eval", "lmms-eval 0.7.3", _think, "gpt-4o-2024-11-20"),
        ),
        metric="judge's grades, %",
        size=218,
        files=FILES,
        source="mm-vet.zip of yuweihao/MM-Vet (GitHub); Hugging Face: lmms-lab/MMVet",
        paper="MM-Vet",
        submission=submission,
    ),
)
