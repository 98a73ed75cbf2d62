"""MMMU: questions of college exams with up to seven images, with options or open.

paper, lmms-eval        image0 " " image1 "\\nWhich of <image 1> and <image 2>?\\nA. ...\\n\\nAnswer with ..."
lmms-eval-interleaved   "Which of" image0 "and" image1 "?\\nA. ...\\n\\nAnswer with ..."

lmms-eval's LLaVA model puts the images in front and leaves their marks in the text; its chat models put them where the
marks are. There, images take the marks' places in the order of their numbers, and of marks that repeat the text between
is lost; here, each mark gets the image of its number.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import (
    NO_LLAVA,
    OPTION_LETTER,
    SHORT_ANSWER,
    Benchmark,
    Mark,
    Protocol,
    Result,
    Row,
    ask,
    ask_lmms_eval,
)
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import mmmu_choice, mmmu_open
from fastvlm_jax.text.conversation import Turn

COLUMNS = ("id", "question", "options", "answer", "question_type")
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
_MARK = re.compile(r"<image (\d{1,9})>")
_ID = re.compile(r"[^_]*_(.+)_\d+")  # validation_Art_Theory_1


def read(folder: epath.Path) -> list[Row]:
    """Reads the validation split."""
    return _read(folder, "validation")


def read_test(folder: epath.Path) -> list[Row]:
    """Reads the test split, whose answers are not public."""
    return _read(folder, "test")


def _read(folder: epath.Path, split: str) -> list[Row]:
    paths = published.find(folder, f"data/{split}-*.parquet", f"*/{split}-*.parquet", f"{split}-*.parquet")
    if not paths:
        raise published.wrong_layout(folder, files_of(split))
    found = published.read_parquet(paths, COLUMNS, IMAGES)
    return published.check_rows([_row(row, split, f"{folder} row {i}") for i, row in enumerate(found)], folder, None)


def files_of(split: str) -> tuple[str, ...]:
    """Returns the line of each layout of a split."""
    return (f"data/{split}-*.parquet (lmms-lab)", f"SUBJECT/{split}-*.parquet (MMMU, 30 subjects)")


def _row(values: Mapping[str, Any], split: str, where: str) -> Row:
    identity = published.text(values, "id", where)
    where = f"{where}, {identity}"
    subject = _ID.fullmatch(identity)
    if not subject or subject[1] not in DOMAIN_OF:
        raise ValueError(f"{where}: its id names none of the 30 subjects, as validation_Art_Theory_1 does")
    choices = _choices(values, where)
    text = published.text(values, "question", where) + options.lines(choices)
    numbers = sorted({int(number) for number in _MARK.findall(text)})
    for number in numbers:
        if values.get(f"image_{number}") is None:
            raise ValueError(f"{where}: image_{number}, which the question marks, is null")
    return Row(
        id=identity,
        question=values["question"],
        pictures=tuple(values[f"image_{number}"] for number in numbers),
        references=None if split == "test" else (published.text(values, "answer", where),),
        fields={"choices": choices, "numbers": tuple(numbers)},
        groups={
            "domain": DOMAIN_OF[subject[1]],
            "subject": subject[1],
            "question_type": values["question_type"],
        },
    )


def _choices(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Returns the options, which are published as a text that holds a Python list; () of an open question."""
    if values["question_type"] == "open":
        return ()
    if values["question_type"] != "multiple-choice":
        raise ValueError(f"{where}: question_type is {shown(values['question_type'])}, not multiple-choice or open")
    choices = options.parse(values["options"], f"{where}: options")
    return options.read({"options": [str(choice) for choice in choices]}, "options", where)


def _text(row: Row, letter: str = OPTION_LETTER, short: str = SHORT_ANSWER) -> str:
    choices = row.fields["choices"]
    return f"{row.question}\n{options.lines(choices)}\n{letter}" if choices else f"{row.question}\n{short}"


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task mmmu_val with its LLaVA model: images first, marks in the text."""
    return ask_lmms_eval(row, _text(row))


def prompt_test(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of the task mmmu_test of lmms-eval 0.7.3, whose YAML names no sentence of the format."""
    return ask_lmms_eval(row, _text(row, "\n", "\n"))


def prompt_interleaved(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task mmmu_val with chat models: each image where its mark is."""
    parts = _MARK.split(_text(row))  # text, number, text, number, text
    content: list[str | int] = []
    for i, part in enumerate(parts):
        if i % 2:
            content.append(row.fields["numbers"].index(int(part)))
        elif part.strip():
            content.append(part.strip())
    return ask(*content)


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer; where no letter can be read, of a guess that the row's id decides.

    Of an open question with several right answers, lmms-eval compares the published list as one text, and so does
    this: such a question is never right. `figures` has the score with any of them.
    """
    choices = row.fields["choices"]
    if choices:
        letter = mmmu_choice.read(answer, choices)
        return Mark(float((letter or mmmu_choice.guess(row.id, choices)) in row.references), letter)
    values = mmmu_open.read(answer)
    return Mark(mmmu_open.score(answer, row.references), " | ".join(map(str, values)) if answer else None)


def figures(results: Sequence[Result]) -> dict[str, float]:
    """Returns the accuracy where any of several right answers of an open question counts, as MMMU's authors count."""
    marks = [
        result.mark.score
        if result.row.fields["choices"]
        else mmmu_open.score(result.answer, _answers(result.row.references[0]))
        for result in results
    ]
    return {"any_of_several_answers": 100 * sum(marks) / len(marks)}


def _answers(text: str) -> list[str]:
    """Returns the answers of an open question: "24/7" and "3.429" of "['24/7', '3.429']", or the text itself."""
    try:
        answers = options.parse(text, "")
    except ValueError:
        return [text]
    return answers if all(isinstance(answer, str) for answer in answers) else [text]


def submission(results: Sequence[Result]) -> dict[str, str]:
    """Returns the server's file: id -> the letter that is read in the answer or guessed, or the open answer."""
    return {result.row.id: _submitted(result.row, result.answer) for result in results}


def _submitted(row: Row, answer: str) -> str:
    choices = row.fields["choices"]
    return (mmmu_choice.read(answer, choices) or mmmu_choice.guess(row.id, choices)) if choices else answer


PAPER = Protocol(
    name="paper",
    version="lmms-eval 0.2.2",
    prompt=prompt,
    score=score,
    max_tokens=16,
    rule="MMMU's parsers: the last letter, or a guess by the question's id; open: a right text or number is in it",
    figures=figures,
)
NEW = dataclasses.replace(PAPER, name="lmms-eval", version="lmms-eval 0.7.3", max_tokens=128)
VALIDATION = Benchmark(
    name="mmmu",
    title="MMMU, validation",
    read=read,
    protocols=(
        PAPER,
        NEW,
        dataclasses.replace(
            NEW,
            name="lmms-eval-interleaved",
            version="lmms-eval 0.7.3, as it asks chat models",
            prompt=prompt_interleaved,
        ),
    ),
    metric="accuracy, %",
    size=900,
    files=files_of("validation"),
    source="Hugging Face: lmms-lab/MMMU or MMMU/MMMU",
    paper="MMMU",
    refused=NO_LLAVA,
)
BENCHMARKS = (
    VALIDATION,
    dataclasses.replace(
        VALIDATION,
        name="mmmu-test",
        title="MMMU, test",
        read=read_test,
        protocols=(PAPER, dataclasses.replace(NEW, prompt=prompt_test, max_tokens=512)),
        size=10500,
        files=files_of("test"),
        paper="",
        submission=submission,
    ),
)
