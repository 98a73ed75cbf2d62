"""MathVista, testmini: questions of mathematics about figures, with options or free answers, scored by rules alone.

lmms-eval            image "\\nQuestion: How many? (Unit: g)\\nHint: Please answer the question requiring ..."
lmms-eval-solution   the same, and "\\nSolution:"
lmms-eval-format     image "\\nHow many? (Unit: g)\\nAnswer the question using a single integer number."

lmms-eval and MathVista let a judge extract the answer from a long reply. Here, an answer that no rule shortens is
compared as a whole: a prompt that lets the model reason scores lower than with a judge, the format prompt hardly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import (
    NO_LLAVA,
    OPTION_LETTER,
    Benchmark,
    Mark,
    Picture,
    Protocol,
    Result,
    Row,
    ask_lmms_eval,
    mean_by,
)
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import mathvista as scores
from fastvlm_jax.text.conversation import Turn

LISTS = ("testmini.json", "annot_testmini.json", "data/testmini.json", "data/annot_testmini.json")
FILES = ("data/testmini-*.parquet", "testmini.json or annot_testmini.json, and images/ (official)")
COLUMNS = (
    "pid", "question", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata",
)  # fmt: skip
GROUPS = ("language", "source", "category", "task", "context", "grade")
# (answer type, decimal places) -> what the hint asks for, its example, what the format sentence asks for.
KINDS = {
    ("integer", 0): ("an integer answer", "value, e.g., 1, 2, 3", "single integer number"),
    ("float", 1): (
        "a floating-point number with one decimal place", "value, e.g., 1.2, 1.3, 1.4",
        "single floating-point number with one decimal place",
    ),
    ("float", 2): (
        "a floating-point number with two decimal places", "value, e.g., 1.23, 1.34, 1.45",
        "single floating-point number with two decimal places",
    ),
    ("list", 0): ("a Python list as an answer", "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]", "Python list"),
}  # fmt: skip


def read(folder: epath.Path) -> list[Row]:
    """Reads the testmini split."""
    if paths := published.find(folder, "data/testmini-*.parquet", "testmini-*.parquet"):
        found = published.read_parquet(paths, COLUMNS, ("decoded_image",))
        rows = [_row(row, row["decoded_image"], f"{paths[0].parent} row {i}") for i, row in enumerate(found)]
        return published.check_rows(rows, paths[0].parent)
    if not (paths := published.find(folder, *LISTS)):
        raise published.wrong_layout(folder, FILES)
    images, rows = published.Images(paths[0].parent, "."), []
    for identity, problem in published.read_json(paths[0]).items():
        where = f"{paths[0]}, {identity}"
        rows.append(_row(problem, images(published.text(problem, "image", where)), where))
    images.check()
    return published.check_rows(rows, paths[0])


def _row(values: Mapping[str, Any], picture: Picture | None, where: str) -> Row:
    kind, precision = published.text(values, "answer_type", where), _precision(values, where)
    choices = options.read(values, "choices", where) if published.get(values, "choices", where) else ()
    if (published.text(values, "question_type", where) == "multi_choice") != bool(choices):
        raise ValueError(f"{where}: question_type is {shown(values['question_type'])}, with {len(choices)} choices")
    if not choices and (kind, precision) not in KINDS:
        raise ValueError(
            f"{where}: answer_type is {shown(kind)} of precision {shown(values['precision'])}, of no known question"
        )
    about = published.get(values, "metadata", where)
    groups = {name: str(published.get(about, name, f"{where}: metadata")) for name in GROUPS}
    return Row(
        id=str(published.get(values, "pid", where)),
        question=published.text(values, "question", where),
        pictures=published.pictures_of([picture]),
        references=(published.text(values, "answer", where),),
        fields={
            "choices": choices,
            "unit": published.get(values, "unit", where) or "",
            "answer_type": kind,
            "precision": precision,
            "skills": published.texts(about, "skills", where) if published.get(about, "skills", where) else (),
        },
        groups={"question_type": values["question_type"], "answer_type": kind, **groups},
    )


def _precision(values: Mapping[str, Any], where: str) -> int:
    """Returns the decimal places of a float, published as 1.0 or 2.0; 0 for other answers."""
    value = published.get(values, "precision", where)
    return int(value) if values["answer_type"] == "float" and value in (1, 2) else 0


def _hint(row: Row) -> str:
    if row.fields["choices"]:
        return "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    what, example, _ = KINDS[row.fields["answer_type"], row.fields["precision"]]
    return f"Hint: Please answer the question requiring {what} and provide the final {example}, at the end."


def _question(row: Row) -> str:
    return row.question + (f" (Unit: {row.fields['unit']})" if row.fields["unit"] else "")


def _reasoned(row: Row) -> str:
    choices = [f"({letter}) {option}" for letter, option in options.lettered(row.fields["choices"])]
    return "\n".join((f"Question: {_question(row)}", *(["Choices:", *choices] if choices else []), _hint(row))).strip()


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task mathvista_testmini_cot."""
    return ask_lmms_eval(row, _reasoned(row))


def prompt_solution(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task mathvista_testmini_solution."""
    return ask_lmms_eval(row, f"{_reasoned(row)}\nSolution:")


def prompt_format(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task mathvista_testmini_format."""
    if row.fields["choices"]:
        text = f"{_question(row)}\n{options.lines(row.fields['choices'])}{OPTION_LETTER}"
    else:
        _, _, what = KINDS[row.fields["answer_type"], row.fields["precision"]]
        text = f"{_question(row)}\nAnswer the question using a {what}."
    return ask_lmms_eval(row, text.strip())


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer; nothing can be read in an empty one, which may be right all the same."""
    choices, kind = row.fields["choices"], row.fields["answer_type"]
    value = scores.normalise(scores.extract(answer, choices, kind), choices, kind, row.fields["precision"])
    right = value is not None and value.strip() == row.references[0].strip()
    return Mark(float(right), value if answer else None)


def figures(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Returns the share of right answers of each skill, percent; a question may need several."""
    return {
        "skills": mean_by((skill, result.mark.score) for result in results for skill in result.row.fields["skills"])
    }


def _protocol(name: str, ask: Callable[[Row], tuple[Turn, ...]]) -> Protocol:
    return Protocol(
        name=name,
        version="lmms-eval 0.7.3, without its judge",
        prompt=ask,
        score=score,
        max_tokens=16384,
        rule="no judge: an option, its letter or a number, else the nearest option; floats rounded as published",
        figures=figures,
    )


BENCHMARKS = (
    Benchmark(
        name="mathvista",
        title="MathVista, testmini, by rules alone",
        read=read,
        protocols=(
            _protocol("lmms-eval", prompt),
            _protocol("lmms-eval-solution", prompt_solution),
            _protocol("lmms-eval-format", prompt_format),
        ),
        metric="accuracy, %",
        size=1000,
        files=FILES,
        source="the MathVista repository; Hugging Face: AI4Math/MathVista",
        paper="MathVista",
        refused=NO_LLAVA
        | {"paper": "the paper does not say which of lmms-eval's three prompts it took, and used a judge"},
    ),
)
