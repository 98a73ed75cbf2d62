"""TextVQA: questions about text in photos, each answered by ten people; validation, and test for its server.

LLaVA, and so the paper, asks with the text that an OCR system found in the photo; lmms-eval asks without.

"paper"      <image>  What is the brand?  Reference OCR token: DAKOTA, DIGITAL  Answer the question using ...
"lmms-eval"  <image>  What is the brand?  Answer the question using ...
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from fastvlm_jax.evaluate.benchmarks.llava_questions import read_llava_questions
from fastvlm_jax.evaluate.scores import vqa_accuracy
from fastvlm_jax.evaluate.scores.evalai import normalise
from fastvlm_jax.text.conversation import Turn

LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
OCR = "\nReference OCR token: "
OFFICIAL = {"validation": "TextVQA_0.5.1_val.json", "test": "TextVQA_0.5.1_test.json"}
IMAGES = {"validation": "train_images", "test": "test_images"}  # the validation split has images of train's folder
FILES = {
    "validation": (
        f"{OFFICIAL['validation']}, the folder train_images and, for OCR tokens, LLaVA's {LLAVA}",
        "validation-*.parquet, in the folder or in its folder data",
    ),
    "test": (
        f"{OFFICIAL['test']} and the folder test_images, without OCR tokens",
        "test-*.parquet, in the folder or in its folder data",
    ),
}


def read(folder: epath.Path, split: str = "validation") -> list[Row]:
    """Reads the questions of a split, in the order of their file.

    Args:
      split: "validation" or "test", whose answers are not public.

    Returns:
      Rows whose fields hold "question_id", a number; "llava", what LLaVA asks below the image, None without OCR tokens;
      and "ocr", where these come from: LLaVA's file or, if it is not there, the files themselves.

    Raises:
      FileNotFoundError, ValueError: files or images are missing or damaged; the message is one line that names them.
    """
    llava = _read_llava(folder) if split == "validation" else None
    if official := published.find(folder, OFFICIAL[split]):
        where, entries = str(official[0]), published.read_objects(official[0], "data")
        images = published.Images(folder, IMAGES[split], f"train_val_images/{IMAGES[split]}")
        names = [published.text(entry, "image_id", f"{where} row {number}") for number, entry in enumerate(entries)]
        pictures = [images(f"{name}.jpg") for name in names]
        images.check()
    elif tables := published.find(folder, f"{split}-*.parquet", f"data/{split}-*.parquet"):
        where, columns = str(tables[0].parent), ["question_id", "question", "answers"]
        columns = columns if split == "validation" else columns[:-1]
        entries = published.read_parquet(tables, columns, ["image"], ["ocr_tokens", "image_id"])
        pictures = [entry["image"] for entry in entries]
    else:
        raise published.wrong_layout(folder, FILES[split])
    rows = [
        _row(entry, picture, split, llava, f"{where} row {number}")
        for number, (entry, picture) in enumerate(zip(entries, pictures, strict=True))
    ]
    return published.check_rows(rows, where)


def _read_llava(folder: epath.Path) -> dict[tuple[str, str], str] | None:
    """Returns (image, question in lower case), by which LLaVA joins files, -> what it asks; None without its file."""
    if not (found := published.find(folder, LLAVA)):
        return None
    asked = {}
    for question in read_llava_questions(found[0]):
        words, ocr, _ = question.text.partition(OCR)
        if not ocr:
            raise ValueError(f"{found[0]}: question {shown(words)} has no line of OCR tokens: it is not LLaVA's file")
        asked[str(question.id), words.lower()] = question.text
    return asked


def _row(
    entry: Mapping[str, Any],
    picture: Picture | None,
    split: str,
    llava: Mapping[tuple[str, str], str] | None,
    where: str,
) -> Row:
    references = None
    if split == "validation":
        references = published.texts(entry, "answers", where)
        if len(references) != 10:
            raise ValueError(f"{where} has {len(references)} answers, not 10")
    number, question = published.number(entry, "question_id", where), published.text(entry, "question", where)
    asked, ocr = _asked(entry, question, llava, where)
    fields = {"question_id": number, "llava": asked, "ocr": ocr}
    return Row(str(number), question, published.pictures_of([picture]), references, fields)


def _asked(
    entry: Mapping[str, Any], question: str, llava: Mapping[tuple[str, str], str] | None, where: str
) -> tuple[str | None, str]:
    """Returns what LLaVA asks, from its file or made of the row's OCR tokens, and which of both it was."""
    if llava is not None:
        image = published.text(entry, "image_id", where)
        if (image, question.lower()) not in llava:
            raise ValueError(f"{where}: {LLAVA} does not ask {shown(question)} of {image}: it is of another version")
        return llava[image, question.lower()], LLAVA
    tokens = entry.get("ocr_tokens")
    if tokens is None:
        return None, "none"
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{where}: ocr_tokens is not a list of texts")
    return f"{question}{OCR}{', '.join(tokens)}", "ocr_tokens of the Parquet files"


def _prompt_llava(row: Row) -> tuple[Turn, ...]:
    if row.fields["llava"] is None:
        file = "" if row.references is None else f"add LLaVA's {LLAVA}, "  # of the validation split alone
        mend = f"{file}take the Parquet files, whose ocr_tokens are such, or pass --protocol lmms-eval"
        raise ValueError(f"LLaVA's prompt lists the OCR tokens of the image, which the files do not hold: {mend}")
    return ask_llava(row, row.fields["llava"] + SHORT_ANSWER)


def _prompt_lmms_eval(row: Row) -> tuple[Turn, ...]:
    return ask_lmms_eval(row, row.question.capitalize() + SHORT_ANSWER)


def _score(answer: str, row: Row) -> Mark:
    return Mark(vqa_accuracy.textvqa(answer, row.references), normalise(answer) or None)


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns where the OCR tokens in the prompts come from."""
    return {"ocr_tokens": ", ".join(sorted({result.row.fields["ocr"] for result in results}))}


def submission(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns what TextVQA's server takes: normalised answers, as lmms-eval 0.2.x and 0.7.3 send them."""
    return [{"question_id": result.row.fields["question_id"], "answer": normalise(result.answer)} for result in results]


PAPER = Protocol(
    name="paper",
    version="LLaVA 2024-05",
    prompt=_prompt_llava,
    score=_score,
    max_tokens=128,
    rule="soft accuracy over ten people, both sides normalised as by EvalAI; asked with OCR tokens",
    figures=_figures,
)
LMMS_EVAL = Protocol(
    name="lmms-eval",
    version="lmms-eval 0.7.3",
    prompt=_prompt_lmms_eval,
    score=_score,
    max_tokens=1024,
    rule="soft accuracy over ten people, both sides normalised as by EvalAI; asked without OCR tokens",
    figures=lambda results: {"ocr_tokens": "not in the prompt"},
)
PROTOCOLS = (PAPER, dataclasses.replace(PAPER, name="llava"), LMMS_EVAL)
SOURCE = "questions and images: TextVQA's site; LLaVA's file: its eval.zip; Hugging Face: lmms-lab/textvqa"
BENCHMARKS = (
    Benchmark(
        name="textvqa",
        title="TextVQA, validation",
        read=read,
        protocols=PROTOCOLS,
        metric="soft accuracy, %",
        size=5000,
        files=FILES["validation"],
        source=SOURCE,
        paper="TextVQA",
        in_domain=True,
        submission=submission,
    ),
    Benchmark(
        name="textvqa-test",
        title="TextVQA, test",
        read=functools.partial(read, split="test"),
        protocols=PROTOCOLS,
        metric="none: TextVQA's server scores the submission",
        size=5734,
        files=FILES["test"],
        source=SOURCE,
        in_domain=True,
        submission=submission,
    ),
)
