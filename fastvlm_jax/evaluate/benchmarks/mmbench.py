"""MMBench, dev, English: questions with up to four options, each asked with its options in several orders.

llava       image "\\nhint\\nquestion\\nA. cat\\nB. dog\\nAnswer with the option's letter ..."
lmms-eval   image "\\nhint question There are several options:\\nA. cat\\nB. dog\\n\\nAnswer with the ..."

index 241 and 1000241 are the same question with its options turned: it counts only if both answers are right. The
official score asks a judge about answers that no rule reads; here, as in lmms-eval's static task, rules alone decide.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import (
    OPTION_LETTER,
    Benchmark,
    Mark,
    Protocol,
    Result,
    Row,
    ask_llava,
    ask_lmms_eval,
    mean_by,
)
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import mmbench as scores
from fastvlm_jax.evaluate.table import read_table
from fastvlm_jax.text.conversation import Turn

FILES = ("mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv (official, LLaVA, VLMEvalKit)", "en/dev-*.parquet")
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category")
L2 = ("l2-category", "L2-category")  # the table's name, the hub's name
# Cells that pandas, with which LLaVA reads the table, takes for empty; for LLaVA, "nan" and "none" in any case too.
EMPTY = frozenset(
    (
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
        "NULL", "n/a", "null",
    )
)  # fmt: skip


def read(folder: epath.Path) -> list[Row]:
    """Reads the rows, with those that turn the options of others."""
    if tables := published.find(folder, "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv"):
        found = read_table(tables[0], COLUMNS, ("image",))
        return published.check_rows([_row(row, f"{tables[0]} row {i}") for i, row in enumerate(found)], tables[0])
    paths = published.find(folder, "en/dev-*.parquet", "dev-*.parquet", "data/dev-*.parquet")
    if not paths:
        raise published.wrong_layout(folder, FILES)
    found = published.read_parquet(paths, COLUMNS, ("image",), L2)
    return published.check_rows([_row(row, f"{paths[0].parent} row {i}") for i, row in enumerate(found)], folder)


def _row(values: Mapping[str, Any], where: str) -> Row:
    if not str(values["index"]).isdecimal():
        raise ValueError(f"{where}: index is {shown(values['index'])}, not a number")
    cells = {name: _cell(values[name]) for name in ("hint", "A", "B", "C", "D")}
    letters = "".join(letter for letter in "ABCD" if cells[letter])
    level = next((values[name] for name in L2 if values.get(name)), None)
    return Row(
        id=str(int(values["index"])),
        question=published.text(values, "question", where),
        pictures=published.pictures_of([values["image"]]),
        references=(options.one_of(letters, values, "answer", where),),
        fields=cells,
        groups={"category": published.text(values, "category", where), **({"l2-category": level} if level else {})},
    )


def _cell(value: Any) -> str:
    """Returns a cell; empty cells of the table are "nan" or null in the hub's files."""
    return "" if value is None or str(value) == "nan" else str(value)


def prompt_llava(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of LLaVA's model_vqa_mmbench.py --single-pred-prompt: options to the first empty one."""
    cells = {n: "" if cell in EMPTY or cell.lower() in ("nan", "none") else cell for n, cell in row.fields.items()}
    choices = list(itertools.takewhile(bool, (cells[letter] for letter in "ABCD")))
    text = "\n".join(filter(None, (cells["hint"], row.question, options.lines(choices))))
    return ask_llava(row, text + OPTION_LETTER)


def prompt_lmms_eval(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's task mmbench_en_dev_static: all options that are not empty."""
    hint = f"{row.fields['hint']} " if row.fields["hint"] else ""
    choices = "".join(f"\n{letter}. {row.fields[letter]}" for letter in "ABCD" if row.fields[letter])
    return ask_lmms_eval(row, f"{hint}{row.question} There are several options:{choices}\n{OPTION_LETTER}")


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of one row; whether its item counts, `aggregate` tells."""
    return options.mark(scores.read_static(answer, {letter: row.fields[letter] or "nan" for letter in "ABCD"}), row)


def items(results: Sequence[Result]) -> dict[int, bool]:
    """Returns index of the item -> whether the answers to all of its rows are right."""
    return scores.items_right({int(result.row.id): result.mark.score == 1 for result in results})


def aggregate(results: Sequence[Result]) -> float:
    """Returns the share of items of which all rows are right, percent; 0 if there are no items."""
    right = items(results).values()
    return 100 * sum(right) / max(len(right), 1)


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the number of items, and the share that counts of each category; groups hold the mean of the rows."""
    right = items(results)
    found: dict[str, Any] = {"items": len(right)}
    for kind in ("category", "l2-category"):
        rows = (result.row for result in results if int(result.row.id) in right and kind in result.row.groups)
        if shares := mean_by((row.groups[kind], right[int(row.id)]) for row in rows):
            found[f"items_right_by_{kind}"] = shares
    return found


def submission(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the rows of the table that the server takes, as LLaVA writes them; the server wants .xlsx."""
    return [
        {
            "index": int(result.row.id),
            "question": result.row.question,
            **{letter: result.row.fields[letter] for letter in "ABCD"},
            "prediction": result.answer,
            "answer": result.row.references[0],
            "split": "dev",
        }
        for result in results
    ]


STATIC = Protocol(
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    prompt=prompt_lmms_eval,
    score=score,
    max_tokens=1024,
    rule="the option's letter, else its text, else a letter read tolerantly; all rotations must be right; no judge",
    aggregate=aggregate,
    figures=figures,
)
BENCHMARKS = (
    Benchmark(
        name="mmbench",
        title="MMBench, dev, English, by rules alone",
        read=read,
        protocols=(
            STATIC,
            dataclasses.replace(
                STATIC,
                name="llava",
                version="LLaVA 2024-05, scored as lmms-eval 0.7.3",
                prompt=prompt_llava,
                rule=f"LLaVA leaves the score to the server; here {STATIC.rule}",
            ),
        ),
        metric="items with all rotations right, %",
        size=4329,
        files=FILES,
        source="table: the MMBench site; Hugging Face: lmms-lab/MMBench, en",
        refused={"paper": "lmms-eval 0.2.2 asks a judge about MMBench, and the paper gives no MMBench figure"},
        submission=submission,
    ),
)
