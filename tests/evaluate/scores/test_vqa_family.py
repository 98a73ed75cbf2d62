"""The rules of GQA, VQAv2, TextVQA and POPE equal those of LLaVA and lmms-eval, which run in processes of their own."""

import random

import generated
import harness
import pytest

from fastvlm_jax.evaluate.scores import equality, evalai, gqa, pope, vqa_accuracy

LMMS_EVAL = """
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results

def main(value):
    processor = EvalAIAnswerProcessor()
    vqav2, textvqa = [], []
    for prediction, references in value["asked"]:
        doc = {"question_id": 1, "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(references)]}
        result = vqav2_process_results(doc, [prediction])
        vqav2.append([result["exact_match"], result["submission"]["answer"]])
        doc = {"question_id": 1, "answers": list(references)}
        textvqa.append(textvqa_process_results(doc, [prediction])["exact_match"])
    marks = [
        pope.pope_process_results({"question_id": 1, "answer": label}, [text])["pope_accuracy"]
        for text, label in value["pope"]
    ]
    return {
        "normalised": [processor(text) for text in value["texts"]],
        "partly": [processor.process_digit_article(processor.process_punctuation(text)) for text in value["texts"]],
        "vqav2": vqav2,
        "textvqa": textvqa,
        "gqa": exact(value["gqa"]),
        "pope": [mark["score"] for mark in marks],
        "f1": [
            aggregate(marks)
            for aggregate in (
                pope.pope_aggregate_precision, pope.pope_aggregate_recall, pope.pope_aggregate_f1_score,
                pope.pope_aggregate_accuracy, pope.pope_aggregate_yes_ratio,
            )
        ],
    }
"""
# The metric of lmms-eval 0.2.1 is a package of its own, whose code 0.2.3 and 0.7.3 took over.
EXACT = """
from lmms_eval.api.metrics import exact_match_hf_evaluate

def exact(pairs):
    case = dict(ignore_case=True, ignore_punctuation=True)
    return [float(exact_match_hf_evaluate([a], [b], **case)["exact_match"]) for a, b in pairs]
"""
NO_EXACT = "exact = lambda pairs: None"
LLAVA = """
import contextlib, io, json, os, tempfile
from llava.eval.eval_pope import eval_pope
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator

def main(value):
    textvqa = TextVQAAccuracyEvaluator()
    answers = [{"text": text} for text, _ in value["pope"]]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "labels.json")
        with open(path, "w") as file:
            file.writelines(json.dumps({"label": label}) + chr(10) for _, label in value["pope"])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            eval_pope(answers, path)
    return {
        "normalised": [textvqa.answer_processor(text) for text in value["texts"]],
        "textvqa": [
            textvqa._compute_answer_scores(references).get(textvqa.answer_processor(prediction), 0.0)
            for prediction, references in value["asked"]
        ],
        "pope": [answer["text"] for answer in answers],
        "f1": out.getvalue().splitlines()[2:7],
    }
"""


def questions() -> list:
    """(answer, ten references): the references are few texts in several spellings, so that answers often match."""
    rng, texts = random.Random(3), generated.answers(11000, seed=4)
    asked = []
    for i in range(0, len(texts), 11):
        prediction, *others = texts[i : i + 11]
        few = others[: rng.randint(1, 3)] + [prediction] * rng.randint(0, 2)
        few += [rng.choice([prediction + ".", f"the {prediction}", prediction.upper(), prediction.replace(",", "")])]
        same = rng.choice([[], [], [], [few[-1]], [prediction]])
        asked.append([prediction, rng.choices(same or few, k=10 - len(others[:2])) + (same * 2 or others[:2])])
    return asked


@pytest.fixture(scope="module")
def value() -> dict:
    yes_no = ["Yes", "No", "no", "yes", "not", "there", "is", "a", "dog", "NO", "nope", "YES"]
    said = generated.answers(5000, seed=1, words=yes_no) + generated.answers(5000, seed=2)
    said[::3] = [text[:3].strip(" .,") for text in said[::3]]
    rng = random.Random(0)
    texts = generated.answers(10000, seed=5)
    spelt = [
        rng.choice([a, a.lower(), a.rstrip("."), a.replace("-", ""), b])
        for a, b in zip(texts, [*texts[1:], ""], strict=True)
    ]
    return {
        "texts": texts,
        "asked": questions(),
        "gqa": [list(pair) for pair in zip(texts, spelt, strict=True)],
        "pope": [[text, rng.choice(["yes", "no"])] for text in said],
    }


@pytest.mark.parametrize("version", harness.LMMS_EVAL)
def test_rules_of_lmms_eval(value, version):
    exact = NO_EXACT if version == "lmms-eval-0.2.1" else EXACT
    if version != "lmms-eval-0.7.3":
        value = {**value, "texts": value["texts"][:500]}  # their normalisers are the same file
    theirs = harness.ask(version, exact + LMMS_EVAL, value)
    vqav2 = vqa_accuracy.vqav2_lmms_eval_0_7 if version == "lmms-eval-0.7.3" else vqa_accuracy.vqav2_lmms_eval_0_2
    assert theirs["normalised"] == [evalai.normalise(text) for text in value["texts"]]
    assert theirs["partly"] == [evalai.signs_and_words(text) for text in value["texts"]]
    theirs["vqav2"], compared = zip(*theirs["vqav2"], strict=True)
    assert theirs["vqav2"] == pytest.approx([vqav2(*asked) for asked in value["asked"]], abs=1e-12)
    if version == "lmms-eval-0.7.3":
        assert list(compared) == [evalai.normalise_lightly(text) for text, _ in value["asked"]]
    assert theirs["textvqa"] == pytest.approx([vqa_accuracy.textvqa(*asked) for asked in value["asked"]], abs=1e-12)
    for name in ("vqav2", "textvqa"):
        assert {0, 0.3, 0.6, 0.9, 1} <= {round(score, 9) for score in theirs[name]}, name
    if theirs["gqa"]:
        assert theirs["gqa"] == [equality.lmms_eval(*pair) for pair in value["gqa"]]
    pairs = [(pope.lmms_eval(text), label) for text, label in value["pope"]]
    assert theirs["pope"] == [float(read == label) for read, label in pairs]
    counts = pope.count(pairs)
    assert theirs["f1"] == pytest.approx(
        [counts.precision, counts.recall, counts.f1, counts.accuracy, counts.yes_labels], abs=1e-12
    )
    assert counts.unread_yes > 100 and counts.true_yes > 100


def test_rules_of_llava(value):
    theirs = harness.ask(harness.LLAVA, LLAVA, value)
    assert theirs["normalised"] == [evalai.normalise(text) for text in value["texts"]]
    assert theirs["textvqa"] == pytest.approx([vqa_accuracy.textvqa(*asked) for asked in value["asked"]], abs=1e-12)
    read = [pope.llava(text) for text, _ in value["pope"]]
    assert theirs["pope"] == read and {"yes", "no"} == set(read)
    counts = pope.count((said, label) for said, (_, label) in zip(read, value["pope"], strict=True))
    ours = [counts.accuracy, counts.precision, counts.recall, counts.f1, counts.yes_share]
    assert [float(line.split(": ")[1]) for line in theirs["f1"]] == pytest.approx(ours, abs=1e-12)


@pytest.mark.parametrize(
    "text, whole, partly",
    [
        ("Two dogs, isnt it?", "2 dogs isn't it", "2 dogs isn't it"),
        ("cat's toy", "cat 's toy", "cat's toy"),
        ("a-b 1,000", "b 1000", "ab 1000"),
        ("U.S.A.", "usa", "usa"),
        ("12:30pm.", "12:30pm", "12:30pm"),
        ("1,000-2,000", "1000 2000", "10002000"),
        ("yes,no", "yesno", "yes no"),
        ("." * 40 + "x", "." * 8 + "x", "." * 8 + "x"),
        ("None", "0", "0"),
        ("the", "", ""),
    ],
)
def test_normaliser_of_evalai(text, whole, partly):
    assert (evalai.normalise(text), evalai.signs_and_words(text)) == (whole, partly)


@pytest.mark.parametrize("matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_three_people_who_agree_make_an_answer_right(matches, score):
    assert vqa_accuracy.soft_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(score)


def test_no_references_score_nothing():
    assert vqa_accuracy.soft_accuracy("", []) == 0


OFFICIAL_ALONE = [("two", ["2"] * 10, 0), ("Red.", ["red"] * 9 + ["reds"], 1), ("red\n", ["red"] * 10, 1)]


@pytest.mark.parametrize("prediction, references, score", OFFICIAL_ALONE)
def test_official_rule_of_vqav2_compares_references_that_agree_as_they_are(prediction, references, score):
    assert vqa_accuracy.vqav2_official(prediction, references) == score


@pytest.mark.parametrize(
    "prediction, references, lmms_eval_0_2, lmms_eval_0_7, textvqa",
    [
        ("two", ["2"] * 10, 1, 1, 1),
        ("1,000", ["1,000"] * 10, 0, 1, 1),
        ("light-blue", ["light-blue"] * 10, 0, 1, 1),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9, 0.9, 0.9),
        ("coca-cola", ["coca cola"] * 10, 1, 1, 1),
        ("yes, it is", ["yes"] * 10, 0, 0, 0),
        ("the dog", ["the dog"] * 10, 0, 1, 1),
        ("the dog", ["the dog"] * 9 + ["dog"], 1, 1, 1),
        ("cat's", ["cat's"] * 10, 0, 1, 1),
        ("", ["none"] * 5 + ["no"] * 5, 0, 0, 0),
        ("coca-cola", ["cocacola"] * 10, 0, 0, 0),
        ("$5.00", ["5.00"] * 10, 0, 0, 0),
    ],
)
def test_soft_accuracies(prediction, references, lmms_eval_0_2, lmms_eval_0_7, textvqa):
    assert vqa_accuracy.vqav2_lmms_eval_0_2(prediction, references) == pytest.approx(lmms_eval_0_2)
    assert vqa_accuracy.vqav2_lmms_eval_0_7(prediction, references) == pytest.approx(lmms_eval_0_7)
    assert vqa_accuracy.textvqa(prediction, references) == pytest.approx(textvqa)


@pytest.mark.parametrize(
    "prediction, answer, llava, lmms_eval",
    [
        ("yes.", "yes", 1, 1),
        ("no!", "no", 0, 1),
        ("left .", "left", 0, 0),
        ("the left", "left", 0, 0),
        ("light-blue", "lightblue", 0, 1),
        ("light-blue", "light blue", 0, 0),
        ("two", "2", 0, 0),
        ("yes, it is", "yes", 0, 0),
        ("Yes...", "yes", 1, 1),
    ],
)
def test_equality_of_gqa(prediction, answer, llava, lmms_eval):
    assert (gqa.llava(prediction, answer), equality.lmms_eval(prediction, answer)) == (llava, lmms_eval)


@pytest.mark.parametrize(
    "answer, llava, lmms_eval",
    [
        ("Yes", "yes", "yes"),
        ("No, there is no cat.", "no", None),
        ("Yes, but not clearly", "no", None),
        ("Yes. There is no dog", "yes", None),
        ("Yes.", "yes", None),
        ("NO", "yes", "no"),
        ("", "yes", None),
        ("I don't know", "yes", None),
        ("nope", "yes", None),
        ("no\ndog", "yes", None),
    ],
)
def test_yes_or_no_of_pope(answer, llava, lmms_eval):
    assert (pope.llava(answer), pope.lmms_eval(answer)) == (llava, lmms_eval)


def test_counts_of_pope():
    pairs = (
        [("yes", "yes")] * 3
        + [("yes", "no")]
        + [("no", "no")] * 2
        + [("no", "yes")] * 2
        + [(None, "yes"), (None, "no")]
    )
    counts = pope.count(pairs)
    assert counts == pope.Counts(true_yes=3, false_yes=1, true_no=2, false_no=2, unread_yes=1, unread_no=1)
    assert (counts.precision, counts.recall, counts.accuracy, counts.yes_share) == (0.75, 0.6, 0.5, 0.4)
    assert counts.yes_labels == 0.6
    assert counts.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert pope.count([]).f1 == 0 == pope.count([("no", "yes")]).f1  # LLaVA's script divides by zero
