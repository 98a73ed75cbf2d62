"""The rules of the benchmarks with options equal those of LLaVA and lmms-eval, which run in processes of their own."""

import random
import string

import generated
import harness
import pytest

from fastvlm_jax.evaluate.scores import ai2d, cvbench, mathvista, mmbench, mmmu_choice, mmmu_open, scienceqa, seedbench

OLD = """
import random, string
from lmms_eval.tasks.ai2d import utils as ai2d
from lmms_eval.tasks.mathvista import mathvista_evals
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.scienceqa import utils as scienceqa
from lmms_eval.tasks.seedbench import utils as seedbench

random.choice = lambda letters: None  # of MMMU, where no letter is read

def edits(one, other):  # stands for the package Levenshtein, which is not installed
    rows = [[i + k for k in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for k, b in enumerate(other, 1):
            rows[i][k] = min(rows[i - 1][k] + 1, rows[i][k - 1] + 1, rows[i - 1][k - 1] + (a != b))
    return rows[-1][-1]

mathvista_evals.distance = edits
mathvista_evals.MathVistaEvaluator.__init__ = lambda self: None
evaluator = mathvista_evals.MathVistaEvaluator()

def main(value):
    asked = value["asked"]
    numbered = [(text, options, "ABCDE".index(answer)) for text, options, answer in asked]
    filtered = ai2d.MultiChoiceRegexFilter().apply([[text] for text, _, _ in asked], [None] * len(asked))
    return {
        "scienceqa": [
            scienceqa.sqa_process_results({"choices": options, "answer": answer}, [text])["exact_match"]
            for text, options, answer in numbered
        ],
        "ai2d": exact([(text.strip(), answer) for text, (_, _, answer) in zip(filtered, asked)]),
        "seedbench": [
            seedbench.seed_aggregation_result([
                seedbench.seed_process_result({"answer": answer, "data_type": "image", "question_id": "1"}, [text])[
                    "seed_all"
                ]
            ])
            for text, _, answer in asked
        ],
        "mmmu": [
            mmmu.parse_multi_choice_response(text, list("ABCDE"[: len(options)]), dict(zip("ABCDE", options)))
            for text, options, _ in asked
        ],
        "open": [mmmu.eval_open(right, mmmu.parse_open_response(text)) for text, right in value["open"]],
        "mathvista": [mathvista(*question) for question in value["mathvista"]],
    }

def mathvista(text, options, kind, precision):
    problem = {"question_type": "multi_choice" if options else "free_form", "answer_type": kind, "choices": options}
    # The judge gives back what it was asked about.
    evaluator.get_chat_response = lambda *args, **kwargs: text
    extraction = evaluator.extract_answer(text, {**problem, "query": ""}, quick_extract=True)
    return evaluator.normalize_extracted_answer(extraction, options, problem["question_type"], kind, precision)
"""
EXACT = """
from lmms_eval.api.metrics import exact_match_hf_evaluate

def exact(pairs):
    case = dict(ignore_case=True, ignore_punctuation=True)
    return [float(exact_match_hf_evaluate([a], [b], **case)["exact_match"]) for a, b in pairs]
"""
# The metric of lmms-eval 0.2.1 is a package of its own, whose code 0.2.3 and 0.7.3 took over.
NO_EXACT = "exact = lambda pairs: None"
NEW = """
from lmms_eval.tasks.cv_bench import utils as cv_bench
from lmms_eval.tasks.mmbench import mmbench_evals

mmbench_evals.pd.isna = lambda value: value is None
mmbench_evals.eval_logger.info = lambda text: None
evaluator_of_mmbench = mmbench_evals.MMBench_Evaluator()

class Rows(list):
    iloc = property(lambda self: self)

def new(value):
    sources = value["sources"]
    cv = [
        cv_bench.cv_bench_process_results(
            {"idx": 0, "answer": f"({answer})", "type": "2D", "task": "t", "source": sources[i % len(sources)]}, [text]
        )["cv_bench_acc"]
        for i, (text, _, answer) in enumerate(value["asked"])
    ]
    mmbench = []
    for text, options, answer in value["asked"]:
        row = {"index": 1, "prediction": text, **dict(zip("ABCD", [*options, "nan", "nan"]))}
        mmbench.append(evaluator_of_mmbench.eval_sub_data(Rows([row]), {1: answer}, static_only=True))
    return {
        "cvbench": [row["is_correct"] for row in cv],
        "means": [cv_bench.cv_bench_default_aggregate_results(cv[i : i + 30]) for i in range(0, len(cv), 30)],
        "mmbench": mmbench,
    }

old = main
main = lambda value: {**old(value), **new(value)}
"""
LLAVA = """
import contextlib, io, json, os, runpy, sys, tempfile

def main(asked):
    problems = {
        str(i): {"choices": options, "answer": "ABCDE".index(answer), "question": "q"}
        for i, (_, options, answer) in enumerate(asked)
    }
    answers = [{"question_id": str(i), "text": text, "prompt": "<image>"} for i, (text, _, _) in enumerate(asked)]
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        for name, value in (("problems.json", problems), ("pid_splits.json", {"test": list(problems)})):
            with open(path(name), "w") as file:
                json.dump(value, file)
        with open(path("answers.jsonl"), "w") as file:
            file.writelines(json.dumps(answer) + chr(10) for answer in answers)
        sys.argv = ["", "--base-dir", folder, "--result-file", path("answers.jsonl")]
        sys.argv += ["--output-file", path("output.json"), "--output-result", path("result.json")]
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module("llava.eval.eval_science_qa", run_name="__main__")
        return json.load(open(path("result.json")))["results"]
"""
TEXT = """
A B C D E a b c d e A. B. C. D. A: B: C) (D) (E) (a) (b) (A). [B] **C** A, :B :C) (D: answer: Answer: The answer is A.
The answer is B the answer is C The answer is D. BAD Because A cat DOG dog $6 $7 $8 $9 nan banana 2 10 3.14 best option
is correct choice is I choose I pick my 答案是 選 选 정답은 because 1,000 -5 15% ½ İ K \u0131 ß café therefore = so thus
could be x "B"
"""
LETTERS = TEXT.split()
OPTIONS = [
    "$6",
    "$7",
    "$8",
    "$9",
    "cat",
    "dog",
    "a dog",
    "nan",
    "2",
    "10",
    "3.14",
    "Because",
    "B",
    "café",
    "x",
    "banana",
]
RIGHT = [
    "3.14",
    "3.15",
    "2",
    "1000",
    "1,000",
    "pie",
    "x",
    "paris",
    "-5",
    "15",
    "a dog",
    "1e3",
    "['24/7', '3.429']",
    "so",
]
KINDS = [("integer", 0), ("float", 1), ("float", 2), ("list", 0)]


@pytest.fixture(scope="module")
def value() -> dict:
    rng = random.Random(0)
    said = generated.answers(7000, seed=1, words=LETTERS) + generated.answers(4000, seed=2)
    options = [rng.sample(OPTIONS, rng.randint(2, 4)) for _ in said]
    for i in range(0, len(said), 9):  # the option itself, in some form
        k = rng.randrange(len(options[i]))
        form = rng.choice(
            ["{0}", "{0}.", "{0}. {1}", "({0})", "{1}", "({0}) {1}", "The answer is {0}.", "It must be {1} ."]
        )
        said[i] = form.format("ABCD"[k], options[i][k])
    numbers = [rng.choice([*RIGHT, f"{rng.gauss(0, 9):.3f}", str(rng.randint(-9, 2000))]) for _ in said]
    free = [
        f"{text} {number}".strip() if rng.random() < 0.3 else number for text, number in zip(said, numbers, strict=True)
    ]
    return {
        "asked": [
            [text, chosen, rng.choice("ABCD"[: len(chosen)])] for text, chosen in zip(said, options, strict=True)
        ],
        "open": [
            [rng.choice([text, whole]), rng.choice([rng.choice(RIGHT), number, rng.sample(RIGHT, 2)])]
            for text, whole, number in zip(said, free, numbers, strict=True)
        ],
        "mathvista": [
            *([text[:300], chosen, "text", 0] for text, chosen in zip(said, options, strict=True)),
            *([text, [], *rng.choice(KINDS)] for text in free),
        ],
        "sources": ["ADE20K", "COCO", "Omni3D"],
    }


def right(read, asked) -> list[float]:
    return [float(read(text, string.ascii_uppercase[: len(options)]) == answer) for text, options, answer in asked]


@pytest.mark.parametrize("version", harness.LMMS_EVAL)
def test_rules_of_lmms_eval(value, version):
    new = version == "lmms-eval-0.7.3"
    exact = NO_EXACT if version == "lmms-eval-0.2.1" else EXACT
    if not new:
        value = {**value, "mathvista": value["mathvista"][::5]}  # no protocol follows 0.2 there
    if version == "lmms-eval-0.2.1":
        value = {name: questions[::5] for name, questions in value.items()}  # its functions are those of 0.2.3
    theirs = harness.ask(version, exact + OLD + (NEW if new else ""), value)
    asked = value["asked"]
    rule = scienceqa.read_lmms_eval_0_7 if new else scienceqa.read_lmms_eval_0_2
    assert theirs["scienceqa"] == right(rule, asked)
    assert theirs["ai2d"] in (None, right(ai2d.read, asked))
    assert theirs["seedbench"] == right(seedbench.read_lmms_eval, asked)
    assert theirs["mmmu"] == [mmmu_choice.read(text, options) for text, options, _ in asked]
    golds = [[gold] if isinstance(gold, str) else gold for _, gold in value["open"]]
    assert theirs["open"] == [mmmu_open.score(text, gold) for (text, _), gold in zip(value["open"], golds, strict=True)]
    assert theirs["mathvista"] == [
        mathvista.normalise(mathvista.extract(text, options, kind), options, kind, precision)
        for text, options, kind, precision in value["mathvista"]
    ]
    if new:
        correct = [float(cvbench.read(text) == answer) for text, _, answer in asked]
        sources = [value["sources"][i % 3] for i in range(len(asked))]
        assert theirs["cvbench"] == correct
        assert theirs["means"] == pytest.approx(
            [cvbench.mean_by_source(correct[i : i + 30], sources[i : i + 30]) for i in range(0, len(correct), 30)]
        )
        four = [dict(zip("ABCD", [*options, "nan", "nan"], strict=False)) for _, options, _ in asked]
        assert theirs["mmbench"] == [
            float(mmbench.read_static(text, options) == answer)
            for (text, _, answer), options in zip(asked, four, strict=True)
        ]
    for name in ("scienceqa", "seedbench", "open", *(("cvbench", "mmbench") if new else ())):
        assert 0.005 < sum(theirs[name]) / len(theirs[name]) < 0.9, name


def test_rule_of_llava_for_scienceqa(value):
    theirs = harness.ask(harness.LLAVA, LLAVA, value["asked"])
    read = [scienceqa.read_llava(text, string.ascii_uppercase[: len(options)]) for text, options, _ in value["asked"]]
    assert list(theirs.values()) == [-1 if letter is None else "ABCDE".index(letter) for letter in read]
    assert len(set(read)) == 5 and 0.02 < sum(letter is not None for letter in read) / len(read) < 0.9


@pytest.mark.parametrize(
    "answer, llava, lmms_eval_0_7, lmms_eval_0_2",
    [
        ("B", 1, 1, 1),
        ("b", 0, 1, 1),
        ("B.", 0, 1, 0),
        ("(B)", 0, 0, 0),
        ("B. y", 1, 1, 0),
        ("The answer is B.", 1, 0, 0),
        ("The answer is B", 0, 0, 0),
        ("The answer is B. The answer is B.", 0, 0, 0),
        ("D", 0, 0, 0),  # of three options
    ],
)
def test_scienceqa(answer, llava, lmms_eval_0_7, lmms_eval_0_2):
    assert (scienceqa.read_llava(answer, "ABC") == "B") == llava
    assert (scienceqa.read_lmms_eval_0_7(answer, "ABC") == "B") == lmms_eval_0_7
    assert (scienceqa.read_lmms_eval_0_2(answer, "ABC") == "B") == lmms_eval_0_2


@pytest.mark.parametrize(
    "answer, lmms_eval, llava",
    [("B", 1, 1), ("b", 1, 0), ("B. cat", 1, 0), ("Because", 1, 0), ("(B)", 0, 0), ("Answer: B", 0, 0), ("", 0, 0)],
)
def test_seedbench(answer, lmms_eval, llava):
    assert (seedbench.read_lmms_eval(answer, "ABCD") == "B") == lmms_eval
    assert (seedbench.read_llava(answer, "ABCD") == "B") == llava


@pytest.mark.parametrize(
    "answer, right",
    [("B", 1), ("b", 1), ("B. frog", 1), ("(B)", 1)]
    + [(text, 0) for text in ("B) frog", "frog", "Answer: B", "The answer is B.")],
)
def test_ai2d(answer, right):
    assert (ai2d.read(answer, "ABCD") == "B") == right


@pytest.mark.parametrize(
    "answer, letter",
    [("(B)", "B"), ("b", "B"), ("B. two", "B"), ("The answer is (B)", "T"), ("Answer: B", "A"), ("[B]", None)],
)
def test_cvbench(answer, letter):
    assert cvbench.read(answer) == letter


def test_mean_by_source_of_cvbench():
    # ADE20K 1/2, COCO 1, Omni3D 1/2: 2D 3/4, 3D 1/2. The plain mean is 3/5.
    scores, sources = [1, 0, 1, 0, 1], ["ADE20K", "ADE20K", "COCO", "Omni3D", "Omni3D"]
    assert cvbench.mean_by_source(scores, sources) == 0.625
    assert cvbench.mean_by_source(scores[:3], sources[:3]) == 0.75
    assert cvbench.mean_by_source(scores[:2], sources[:2]) == 0.5  # a part of the images
    assert cvbench.mean_by_source([], []) is None


@pytest.mark.parametrize(
    "answer, strict, static",
    [
        ("B. dog", "B", "B"),
        ("(B)", "B", "B"),
        ("The answer is B", "B", "B"),
        ("a dog", "B", "B"),
        ("A dog is here", "B", "B"),
        ("A cat sits on B", "A", "A"),
        ("Answer:B", None, "B"),  # at its end
        ("b", None, None),
        ("dog or cat", None, None),
        ("B or D", None, "B"),  # at its start, which counts more than the end
        ("", None, None),
        ("E", "E", "E"),
        ("B", "B", "B"),
    ],
)
def test_mmbench(answer, strict, static):
    options = {"A": "cat", "B": "dog", "C": "bird", "D": "fish"}
    assert (mmbench.read_letter(answer) or mmbench.read_text(answer, options)) == strict
    assert mmbench.read_static(answer, options) == static


def test_an_item_of_mmbench_counts_if_all_of_its_rotations_are_right():
    right = {1: True, 1000001: True, 2000001: True, 2: True, 1000002: False, 3: False, 1000003: True, 1000004: True}
    assert mmbench.items_right(right) == {1: True, 2: False, 3: False}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B.", "B"),
        ("Answer: (B) $7", "B"),
        ("A or B", "B"),
        ("I think the correct value here is $7 per unit", "B"),
        ("BAD idea", "D"),
        ("B: $7", None),
        ("b", None),
        ("**B**", None),
        ("$7", None),
        ("", None),
    ],
)
def test_choices_of_mmmu(answer, letter):
    assert mmmu_choice.read(answer, ["$6", "$7", "$8", "$9"]) == letter


def test_a_guess_belongs_to_its_question():
    ids = [f"validation_Art_{i}" for i in range(400)]
    guesses = [mmmu_choice.guess(identity, "wxyz") for identity in ids]
    assert guesses[::-1] == [mmmu_choice.guess(identity, "wxyz") for identity in ids[::-1]]
    assert all(60 < guesses.count(letter) < 140 for letter in "ABCD")


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("The answer is 3.14", "3.14", 1),
        ("3.149", "3.15", 1),
        ("1,000", "1000", 1),
        ("15%", "15", 1),
        ("It is Paris, France", "paris", 1),
        ("two", "2", 0),
        ("apple pie", "pie", 1),
        ("25", "2", 0),
        ("-5", "5", 0),
        ("[2,3]", "2", 0),
    ],
)
def test_open_questions_of_mmmu(answer, gold, right):
    assert mmmu_open.score(answer, [gold]) == right


@pytest.mark.parametrize(
    "answer, options, kind, precision, gold, right",
    [
        ("(B) 2", ["1", "2"], "text", 0, "2", 1),
        ("b", ["1", "2"], "text", 0, "2", 0),
        ("", ["1", "2"], "text", 0, "1", 1),
        ("two hundred", ["200", "300"], "text", 0, "200", 1),
        ("0.666", [], "float", 2, "0.67", 1),
        ("5.7", [], "integer", 0, "5", 1),
        ("$5", [], "integer", 0, "5", 0),
        ("1,000", [], "integer", 0, "1000", 0),
        ("0.6", [], "float", 2, "0.60", 0),
        ("[1,2]", [], "list", 0, "[1, 2]", 0),
        ('The answer is "7".', [], "integer", 0, "7", 1),
        ("inf", [], "integer", 0, "7", 0),
    ],
)
def test_mathvista(answer, options, kind, precision, gold, right):
    found = mathvista.normalise(mathvista.extract(answer, options, kind), options, kind, precision)
    assert (found == gold) == right
