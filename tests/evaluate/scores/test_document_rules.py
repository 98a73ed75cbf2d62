"""The rules of DocVQA, ChartQA, OCRBench, RealWorldQA, MME and of one's own data equal those of lmms-eval and SQuAD."""

import random

import generated
import harness
import pytest

from fastvlm_jax.evaluate.benchmark import Result, Row
from fastvlm_jax.evaluate.benchmarks import mme
from fastvlm_jax.evaluate.benchmarks import realworldqa as realworldqa_rows
from fastvlm_jax.evaluate.scores import (
    anls,
    containment,
    letters,
    realworldqa,
    relaxed_accuracy,
    token_f1,
    yes_no_start,
)

ASK = """
import builtins
from lmms_eval.api.task import ConfigurableTask, TaskConfig
from lmms_eval.tasks.chartqa.utils import chartqa_process_results
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
from lmms_eval.tasks.realworldqa import utils as realworldqa

builtins.print = lambda *args: None
NAME = "exact_match"

def filtered(text, doc):  # the filter_list of realworldqa.yaml
    words = realworldqa.NumberWordsToDigitsFilter().apply([[text]], [doc])
    options = realworldqa.MultiChoiceRegexFilter(
        group_select=0, ignore_case=True, ignore_punctuation=True, regex_pattern="(\\\\([A-Z]\\\\))"
    )
    return options.apply(words, [doc])[0].strip()

def of_the_task(text, answers):  # what the task docvqa_val makes of the metric
    task = object.__new__(ConfigurableTask)
    task._config = TaskConfig(output_type="generate_until", doc_to_target="answers")
    task.OUTPUT_TYPE, task.features, task.multiple_target = "generate_until", ["answers"], 1
    task._metric_fn_list, task._metric_fn_kwargs = {"anls": anls}, {"anls": {}}
    return task.process_results({"answers": answers}, [text])["anls"]

def ocr(dataset, text, answer):
    doc = {"dataset": dataset, "question_type": "t", "answer": answer}
    return ocrbench_process_results(doc, [text])["ocrbench_accuracy"]["score"]

def chart(text, answer):
    return chartqa_process_results({"type": "human_test", "answer": answer}, [text])["relaxed_overall"]

def points(rows):
    marks = [mme.mme_process_results(doc, [text]) for doc, text in rows]
    parts = {}
    for mark in marks:
        for name, value in mark.items():
            parts.setdefault("cognition" if "cognition" in name else "perception", []).append(value)
    return {name: mme.mme_aggregate_results(values) for name, values in parts.items()}

def main(value):
    return {
        "anls": anls and [anls(answers, [text])["anls"] for text, answers in value["anls"]],
        "anls of the task": anls and [of_the_task(text, answers) for text, answers in value["anls"]],
        "chartqa": [chart(*row) for row in value["chartqa"]],
        "ocrbench": [ocr(*row) for row in value["ocrbench"]],
        "realworldqa": [real(text, doc) for text, doc in value["realworldqa"]],
        "letters": extract_mcq_answer and [extract_mcq_answer(text, list(names)) for text, names in value["letters"]],
        "mme": [mme.parse_pred_ans(text) for text in value["mme"]],
        "points": points(value["points"]),
    }
"""
ANLS = "from lmms_eval.api.metrics import anls\n"
NEW = """
from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

def real(text, doc):
    return realworldqa.realworldqa_process_results(doc, [text])["exact_match"]
"""
# The YAML of 0.2.x has the metric exact_match, which 0.2.1 takes from Hugging Face's `evaluate` and 0.2.3 ports.
OLD = """
from lmms_eval.api import metrics
extract_mcq_answer = None

def ported(predictions, references, **kwargs):
    import string
    import numpy as np
    table = str.maketrans("", "", string.punctuation)
    both = [np.char.translate(np.char.lower(np.asarray(texts)), table=table) for texts in (predictions, references)]
    return {"exact_match": float(np.mean(both[0] == both[1]))}

def real(text, doc):
    exact = getattr(metrics, "exact_match_hf_evaluate", ported)
    score = exact([filtered(text, doc)], [doc["answer"]], ignore_case=True, ignore_punctuation=True)
    return float(score["exact_match"])
"""
# 0.2.3 registers no metric `anls`.
PARTS = {
    "lmms-eval-0.7.3": ANLS + NEW,
    "lmms-eval-0.2.3": "anls = None\n" + OLD,
    "lmms-eval-0.2.1": ANLS + OLD,
}
NUMBERS = [
    "0", "0.0", "-0", "10", "10.4", "10.6", "9.5", "14%", "14", "0.14", "%", "5%%", "1,000", "1000", "1e3", "2019",
    "2010", "$20", "20", "nan", "inf", "-inf", "1_0", "\u0661\u0660", "Yes", "yes.", "", "-3", "3", "1.05", "1",
]  # fmt: skip
YES_NO = ["Yes", "no", "y", "N", "n.", ".", "Y.es", "Not sure", "know", "Nope", "I think yes", "maybe", "NO", "ye s"]
QUESTIONS = [
    "Which way?\nA. Left\nB. Right\nC. Straight on\nPlease answer directly with only the letter of the correct option.",
    "How far?\nA. 5 m\nB. 10 m.\nC. Yes\nD. Yes\nAnswer.",
    "How many cars are there? Please answer directly with a single word or number.",
    "What is U.S. A. here?\nA. \nB. one two",
    "Empty?\nC. ",
]
SAID = [
    "Left", "left", "Straight on", "straight", "Right", "Yes", "three", "Three", "TEN", "3", "5 m", "10 m.", "one two",
    "A", "b", "B.", "(C)", "D:", "A)", "the answer is", "The correct option is", "选", "답:", "i choose", "Because",
]  # fmt: skip


def folded(text: str) -> str:
    """A text in full-width letters."""
    return "".join(
        "\u3000" if char == " " else chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text
    )


@pytest.fixture(scope="module")
def value() -> dict:
    rng, texts = random.Random(0), generated.answers(10000, seed=1)
    texts = [text[: 500 if i == 1 else 25] for i, text in enumerate(texts)]  # distances take the product of the lengths
    near = [
        rng.choice(
            [text, text.upper(), f"  {text}\n", text[1:], text[: len(text) // 2], text + "x", folded(text), other]
        )
        for text, other in zip(texts, [*texts[1:], "ß"], strict=True)
    ]
    answers = [[reference, *rng.sample(texts, rng.choice([0, 0, 0, 1]))] for reference in near]
    numbers = generated.answers(10000, seed=2, words=[*NUMBERS, *generated.WORDS])
    numbers[::2] = [rng.choice(NUMBERS) for _ in numbers[::2]]
    targets = [rng.choice([*NUMBERS, text]) for text in numbers]
    said = generated.answers(10000, seed=3, words=SAID + generated.WORDS)
    said[::2] = generated.answers(5000, seed=4, words=SAID)
    said[::7] = [rng.choice(SAID) for _ in said[::7]]
    docs = [
        {"question": rng.choice(QUESTIONS), "answer": rng.choice(["A", "b", "B", "C", " D ", "3", "Yes", "Yes."])}
        for _ in said
    ]
    yes_no = generated.answers(10000, seed=5, words=[*YES_NO, *generated.WORDS])
    yes_no[::2] = [rng.choice(YES_NO)[: rng.randint(0, 6)] for _ in yes_no[::2]]
    images = [(category, f"{category}/{i}.png") for category in mme.CATEGORIES for i in range(rng.randint(1, 9))]
    points = [
        [{"question_id": image, "category": category, "answer": label}, rng.choice(["Yes", "No.", "n", "maybe"])]
        for category, image in images
        for label in ("Yes", "No")
    ]
    return {
        "anls": [list(pair) for pair in zip(texts, answers, strict=True)],
        "chartqa": [list(pair) for pair in zip(numbers, targets, strict=True)],
        "ocrbench": [
            [rng.choice(["HME100k", "SROIE"]), rng.choice([text, f"It is {text}\nhere", folded(text), ""]), found]
            for text, found in zip(texts, answers, strict=True)
        ],
        "realworldqa": [list(pair) for pair in zip(said, docs, strict=True)],
        "letters": [[text, rng.choice(["ABCD", "AB", "ABCDEFGH"])] for text in said],
        "mme": yes_no,
        "points": points,
    }


def row_of(doc: dict) -> Row:
    kind = "options" if doc["answer"].strip().upper() in ("A", "B", "C", "D") else "open"
    return Row("0", doc["question"], (), (doc["answer"],), groups={"kind": kind})


def result_of(doc: dict, text: str) -> Result:
    row = Row("", "", (), (doc["answer"].lower(),), {"image": doc["question_id"]}, {"category": doc["category"]})
    return Result(row, "", text, mme.score(text, row, yes_no_start.parse_lmms_eval))


@pytest.mark.parametrize("version", PARTS)
def test_rules_of_lmms_eval(value, version):
    theirs = harness.ask(version, PARTS[version] + ASK, value)
    new = version == "lmms-eval-0.7.3"
    if theirs["anls"]:
        assert theirs["anls"] == [anls.score(*asked) for asked in value["anls"]]
        assert {0, 1} < set(theirs["anls"]) and not any(0 < score < 0.5 for score in theirs["anls"])
        asked_by = anls.score if new else anls.score_0_2
        assert theirs["anls of the task"] == [asked_by(text.strip(), answers) for text, answers in value["anls"]]
    assert theirs["chartqa"] == [relaxed_accuracy.score(*asked) for asked in value["chartqa"]]
    contains = containment.score_0_7 if new else containment.score_0_2
    ours = [contains(text, answers, dataset == "HME100k") for dataset, text, answers in value["ocrbench"]]
    assert theirs["ocrbench"] == ours and 0.2 < sum(ours) / len(ours) < 0.8
    score = realworldqa_rows.score_0_7 if new else realworldqa_rows.score_0_2
    marks = [score(text, row_of(doc)).score for text, doc in value["realworldqa"]]
    assert theirs["realworldqa"] == marks and sum(marks) > 400
    if theirs["letters"]:
        assert theirs["letters"] == [letters.extract(*asked) or "" for asked in value["letters"]]
    assert theirs["mme"] == [yes_no_start.parse_lmms_eval(text) or "other" for text in value["mme"]]
    figures = mme.figures([result_of(*asked) for asked in value["points"]])
    assert {name: figures[name] for name in theirs["points"]} == pytest.approx(theirs["points"])


@pytest.mark.parametrize(
    "prediction, references, score",
    [
        ("The cat sat.", ["a cat sat"], 1),
        ("a big red dog", ["red dog"], 0.8),  # 2 of 3 words, 2 of 2
        ("dog dog", ["dog"], 2 / 3),
        ("dog dog", ["dog, dog, cat"], 0.8),
        ("light-blue", ["lightblue"], 1),
        ("light blue", ["lightblue", "blue"], 2 / 3),
        ("theatre", ["the atre"], 0),
        ("An", [""], 1),
        ("", ["x"], 0),
        ("x", ["the"], 0),
        ("1,000", ["1000"], 1),
        ("«1»", ["1"], 0),  # only ASCII punctuation goes
    ],
)
def test_f1_of_squad(prediction, references, score):
    assert token_f1.score(prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    "prediction, references, score",
    [
        ("helo world", ["hello world"], 10 / 11),
        ("abcd", ["ab"], 0.5),
        ("$1,000", ["1,000"], 5 / 6),
        ("the  cat", ["the cat"], 1),
        ("", [""], 1),
        ("hello world", ["helo"], 0),
        ("ab", ["abcd", "abc"], 2 / 3),
        ("1000", ["1,000"], 0.8),
        ("March 7", ["7 March"], 0),
        ("", ["x"], 0),
    ],
)
def test_anls(prediction, references, score):
    assert anls.score(prediction, references) == pytest.approx(score)
    assert anls.score_0_2(prediction, references) == (score > 0)


@pytest.mark.parametrize(
    "prediction, target, right",
    [
        ("10", "10.4", 1), ("10", "10.6", 0), ("14%", "14", 0), ("0.14", "14%", 1), ("1,000", "1000", 0),
        ("1,000", "1,000", 1), ("0.0", "0", 0), ("2019", "2010", 1), ("Yes.", "Yes", 0), ("$20", "20", 0),
        ("1e3", "1000", 1), ("", "", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction, target, right):
    assert relaxed_accuracy.score(prediction, target) == right


@pytest.mark.parametrize(
    "formula, prediction, reference, old, new",
    [
        (False, "The word is CENTRE.", "centre", 1, 1),
        (False, "cent re", "centre", 0, 0),
        (False, "12.50", "12.5", 1, 1),
        (False, "TAN\nWOON", "tan woon", 1, 1),
        (True, "X ^ 2", "X^2", 0, 1),
        (True, "X ^ 2", "x^2", 1, 0),
        (True, r"\frac { a } { b }", r"\frac{a}{b}", 1, 1),
        (False, folded("hello"), "hello", 0, 1),
    ],
)
def test_containment(formula, prediction, reference, old, new):
    assert containment.score_0_2(prediction, ["nothing", reference], formula) == old
    assert containment.score_0_7(prediction, ["nothing", reference], formula) == new


@pytest.mark.parametrize(
    "prediction, reference, old, new",
    [
        ("A. left", "A", 0, 1), ("3.", "3", 1, 1), ("a", "A", 1, 0), ("Three", "3", 1, 0),
        ("The answer is B", "B", 0, 1), ("", "A", 0, 0), ("Right", "B", 1, 0),
        ("2.5", "2.5", 1, 1), ("25", "2.5", 1, 0), ("no", "No.", 1, 0), ("B", "B ", 0, 1),
    ],
)  # fmt: skip
def test_realworldqa(prediction, reference, old, new):
    row = row_of({"question": QUESTIONS[0], "answer": reference})
    assert realworldqa_rows.score_0_2(prediction, row).score == old
    assert realworldqa_rows.score_0_7(prediction, row).score == new
    assert realworldqa.parse_0_7("it is behind", "C") is None


@pytest.mark.parametrize(
    "prediction, parsed, own",
    [
        ("Yes.", "yes", "yes"), ("Nope", "no", "no"), ("n", "no", None), ("I think yes", None, None),
        ("Not sure", "no", "no"), ("maybe", None, None), ("know", "no", "no"), ("", None, None), ("y.", "yes", None),
        ("y. e. s.", None, None), ("N.o", "no", None), ("NO", "no", "no"),
    ],
)  # fmt: skip
def test_yes_and_no_of_mme(prediction, parsed, own):
    assert yes_no_start.parse_lmms_eval(prediction) == parsed
    assert yes_no_start.parse_mme(prediction) == own


def test_points_of_mme_and_images_of_which_one_question_was_asked():
    asked = [
        ("count", 1, "Yes", "yes"),
        ("count", 1, "No", "no"),
        ("count", 2, "Yes", "yes"),
        ("count", 2, "No", "yes"),
    ]
    asked += [("OCR", 3, "Yes", "yes"), ("code_reasoning", 4, "Yes", "yes"), ("code_reasoning", 4, "No", "no")]
    results = [
        result_of({"question_id": f"{category}/{image}", "category": category, "answer": answer}, text)
        for category, image, answer, text in asked
    ]
    assert mme.points(results) == {"count": 75 + 50, "code_reasoning": 200}
    assert mme.total(results) == 325
    assert mme.figures(results) == {
        "perception": 125, "cognition": 200, "points": {"count": 125, "code_reasoning": 200}, "images_asked_once": 1,
    }  # fmt: skip
