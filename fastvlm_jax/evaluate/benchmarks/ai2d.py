"""AI2D: questions about the diagrams of school books, in two forms that are never mixed.

The published images of the questions differ, nothing else. In `ai2d`, letters cover the words that the question asks
about; in `ai2d-no-mask`, they stand beside the words, which can still be read, and models score higher. Only names tell
which one a folder holds: that of its table, or, of Parquet files, that of the folder or of one above it. Files in no
folder with a name as "ai2d-no-mask" are those with masks.
"""

import dataclasses
import functools
import os
import re

from etils import epath

from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import NO_LLAVA, Benchmark, Protocol, Row, ask_lmms_eval
from fastvlm_jax.evaluate.benchmarks import options
from fastvlm_jax.evaluate.scores import ai2d as scores
from fastvlm_jax.evaluate.table import read_table
from fastvlm_jax.text.conversation import Turn

FORMS = {"ai2d": "AI2D_TEST.tsv", "ai2d-no-mask": "AI2D_TEST_NO_MASK.tsv"}  # benchmark -> its table
_NO_MASK = re.compile(r"ai2d.{0,6}no.?mask", re.IGNORECASE)
_PARTS = 6  # folders whose names are looked at: the hub's cache keeps a file four folders below the set's name


def read(folder: epath.Path, form: str) -> list[Row]:
    """Reads the test split of a form, a key of FORMS, from a table of VLMEvalKit or Parquet files of the hub.

    Raises:
      FileNotFoundError: the names of the folder or of its files tell that it holds the other form.
    """
    if table := published.find(folder, FORMS[form]):
        return _read_table(table[0])
    tables = {name for name, table in FORMS.items() if published.find(folder, table)}
    paths = published.find(folder, "data/test-*.parquet", "test-*.parquet")
    if not paths and not tables:
        raise published.wrong_layout(folder, files_of(form))
    held = tables.pop() if tables else told(paths[0])
    if held != form:
        mend = "; put files without masks into a folder named ai2d-no-mask" if held == "ai2d" else ""
        raise FileNotFoundError(
            f"{folder} holds {held}, whose images are not those of {form}: pass --benchmark={held}{mend}"
        )
    return _read_hub(paths)


def told(path: epath.Path) -> str:
    """Returns the form that the names of the folders of a Parquet file tell."""
    names = os.path.abspath(path).split(os.sep)[-_PARTS:]
    return "ai2d-no-mask" if any(_NO_MASK.search(name) for name in names) else "ai2d"


def _read_hub(paths: list[epath.Path]) -> list[Row]:
    rows = []
    for i, row in enumerate(published.read_parquet(paths, ("question", "options", "answer"), ("image",))):
        where = f"{paths[0].parent} row {i}"
        choices = options.read(row, "options", where)
        rows.append(
            Row(
                id=str(i),
                question=published.text(row, "question", where),
                pictures=published.pictures_of([row["image"]]),
                references=(options.letter(row["answer"], choices, f"{where}: answer"),),
                fields={"choices": choices},
            )
        )
    return published.check_rows(rows, paths[0].parent)


def _read_table(path: epath.Path) -> list[Row]:
    rows = []
    for i, row in enumerate(read_table(path, ("index", "question", "A", "B", "answer"), ("image",))):
        choices = options.cells(row)
        rows.append(
            Row(
                id=row["index"],
                question=row["question"],
                pictures=published.pictures_of([row["image"]]),
                references=(options.one_of(options.letters(choices), row, "answer", f"{path} row {i}"),),
                fields={"choices": choices},
            )
        )
    return published.check_rows(rows, path)


def files_of(form: str) -> tuple[str, ...]:
    """Returns the line of each layout of a form."""
    return (f"{FORMS[form]} (VLMEvalKit)", "data/test-*.parquet")


def prompt(row: Row) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's tasks ai2d and ai2d_no_mask."""
    return ask_lmms_eval(row, options.question(row))


LMMS_EVAL = Protocol(
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    prompt=prompt,
    score=options.marker(scores.read),
    max_tokens=16,
    rule="a capital before a full stop at the start, else the whole answer without punctuation, is the option's letter",
)
MASKED = Benchmark(
    name="ai2d",
    title="AI2D, test, with masks",
    read=functools.partial(read, form="ai2d"),
    protocols=(dataclasses.replace(LMMS_EVAL, name="paper", version="lmms-eval 0.2.2"), LMMS_EVAL),
    metric="accuracy, %",
    size=3088,
    files=files_of("ai2d"),
    source="table: VLMEvalKit; Hugging Face: lmms-lab/ai2d",
    paper="AI2D",
    in_domain=True,
    refused=NO_LLAVA,
)
BENCHMARKS = (
    MASKED,
    dataclasses.replace(
        MASKED,
        name="ai2d-no-mask",
        title="AI2D, test, without masks",
        read=functools.partial(read, form="ai2d-no-mask"),
        protocols=(LMMS_EVAL,),
        files=files_of("ai2d-no-mask"),
        source="table: VLMEvalKit; Hugging Face: Efficient-Large-Model/ai2d-no-mask",
        paper="",
        refused=NO_LLAVA
        | {"paper": "the paper's table follows lmms-eval 0.2.2, which has only the form with masks, ai2d"},
    ),
)
