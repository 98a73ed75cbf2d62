"""ScienceQA, AI2D, SEED-Bench, MMBench, CV-Bench, MMMU and MathVista: rows from every layout, prompts and figures.

Their files are written by published_choices.py; test_choice_wrong_files.py has those that are wrong.
"""

import dataclasses
import random

import harness
import pytest
from published_choices import HUB, IMAGE_COLUMNS, MMMU, OTHER, hub, lists_cvbench, mmmu
from published_files import BLUE, GREEN, RED, parquet, read, without

from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS

SENTENCE = "\nAnswer with the option's letter from the given choices directly."


def plain(row, identity=True):
    found = dataclasses.asdict(dataclasses.replace(row, pictures=()))
    found |= {"pictures": [picture.read() for picture in row.pictures]}
    return found if identity else {key: value for key, value in found.items() if key != "id"}


@pytest.mark.parametrize("name", HUB)
def test_layouts_give_the_same_rows_in_the_same_order(name, tmp_path):
    OTHER[name](tmp_path / "other")
    rows, other = hub(name, tmp_path / "hub"), read(name, tmp_path / "other")
    if name == "seedbench":  # the hub has several frames of a video
        assert [picture.read() for picture in rows[1].pictures] == [RED, BLUE, GREEN]
        rows[1], other[1] = (dataclasses.replace(row, pictures=()) for row in (rows[1], other[1]))
    identity = not name.startswith("scienceqa")  # the hub's rows have no ids
    assert [plain(row, identity) for row in rows] == [plain(row, identity) for row in other]
    published = [row for row in HUB[name][1] if name != "seedbench-image" or row["data_type"] == "image"]
    assert [row.question for row in rows] == [row["question"] for row in published]


def test_rows_have_the_published_images_answers_and_groups(tmp_path):
    rows = {name: [plain(row) for row in hub(name, tmp_path / name)] for name in HUB}
    assert [(row["id"], len(row["pictures"]), row["references"]) for row in rows["scienceqa"]] == [
        ("0", 1, ("B",)), ("1", 0, ("A",)), ("2", 1, ("E",)),
    ]  # fmt: skip
    assert rows["scienceqa"][1]["groups"] == {"subject": "social science", "grade": "grade5", "context": "text alone"}
    assert [row["references"] for row in rows["ai2d"]] == [("B",), ("D",)]
    assert [row["groups"]["type"] for row in rows["seedbench"]] == [
        "Instances Counting", "Action Prediction", "Scene Understanding",
    ]  # fmt: skip
    assert [row["id"] for row in rows["seedbench-image"]] == ["101669", "7"]
    assert rows["mmbench"][0]["groups"] == {"category": "object_localization", "l2-category": "finegrained"}
    assert [row["id"] for row in rows["mmbench"]] == ["241", "242", "1000241"]
    assert rows["cvbench-2d"][0]["groups"] == {"type": "2D", "task": "Count", "source": "ADE20K"}
    assert rows["mmmu"][1]["pictures"] == [BLUE]  # its second image has no mark
    assert rows["mmmu"][2]["pictures"] == [RED, BLUE, GREEN]  # an option has the mark of the third
    art = {"domain": "Art and Design", "subject": "Art_Theory", "question_type": "multiple-choice"}
    assert rows["mmmu"][2]["groups"] == art
    assert rows["mathvista"][0]["fields"]["precision"] == 1 and rows["mathvista"][1]["fields"]["choices"] == (
        "45",
        "145",
    )


def test_cvbench_holds_both_parts_in_order(tmp_path):
    lists_cvbench(tmp_path)
    rows = read("cvbench", tmp_path)
    assert [row.id for row in rows] == ["2D-0", "2D-1", "3D-0"]
    assert read("cvbench-3d", tmp_path) == rows[2:]


def results(name, folder, answers, protocol=None):
    rows, protocol = hub(name, folder), BENCHMARKS[name].protocol(protocol)
    return [Result(row, "", text, protocol.score(text, row)) for row, text in zip(rows, answers, strict=True)]


def test_an_item_of_mmbench_counts_with_all_its_rotations(tmp_path):
    protocol = BENCHMARKS["mmbench"].protocol()
    found = results("mmbench", tmp_path, ["dog", "A.", "B"])
    assert [result.mark.score for result in found] == [1, 1, 0]
    assert protocol.aggregate(found) == 50
    assert protocol.figures(found) == {
        "items": 2,
        "items_right_by_category": {"object_localization": 0, "other": 100},
        "items_right_by_l2-category": {"finegrained": 50},
    }
    assert protocol.aggregate(found[2:]) == 0
    assert BENCHMARKS["mmbench"].submission(found)[0] == {
        "index": 241, "question": "Which?", "A": "cat", "B": "dog", "C": "", "D": "", "prediction": "dog",
        "answer": "B", "split": "dev",
    }  # fmt: skip


def test_cvbench_has_the_plain_mean_and_that_by_source(tmp_path):
    found = results("cvbench-2d", tmp_path, ["(B)", "B"])
    assert BENCHMARKS["cvbench-2d"].protocol().figures(found) == {"mean_by_source": 50}


def test_mmmu_guesses_by_the_question_where_no_letter_is_read(tmp_path):
    for answer in ("", "none of these"):
        found = results("mmmu", tmp_path, [answer] * 3)
        assert [result.mark.parsed for result in found] == [None, answer or None, None]
        for i, letters in ((0, "ABCD"), (2, "AB")):
            guess = random.Random(MMMU[i]["id"]).choice(letters)
            assert found[i].mark.score == (guess == MMMU[i]["answer"])


def test_several_right_answers_of_mmmu_are_one_text_as_in_lmms_eval(tmp_path):
    found = results("mmmu", tmp_path, ["(B)", "It is 3.43.", "(B)"])  # 3.429, to two places
    assert [result.mark.score for result in found] == [1, 0, 0]
    assert BENCHMARKS["mmmu"].protocol().figures(found) == {"any_of_several_answers": pytest.approx(200 / 3)}


def test_mmmu_test_is_sent_to_the_server(tmp_path):
    rows = [{**row, "id": row["id"].replace("validation", "test"), "answer": "?"} for row in MMMU]
    parquet(tmp_path / "data/test-00000-of-00001.parquet", rows, IMAGE_COLUMNS["mmmu"])
    found = read("mmmu-test", tmp_path)
    assert [row.references for row in found] == [None] * 3
    sent = [Result(row, "", text, None) for row, text in zip(found, ["It is (D).", "about 7", "A or B"], strict=True)]
    assert BENCHMARKS["mmmu-test"].submission(sent) == {
        "test_Accounting_1": "D", "test_Accounting_2": "about 7", "test_Art_Theory_1": "B",
    }  # fmt: skip


def test_float_questions_of_mathvista_can_be_right(tmp_path):
    found = results("mathvista", tmp_path, ["1.24", "(B)", "12.9", "0.6666", "[2007, 2008]"])
    assert [result.mark for result in found] == [(1, "1.2"), (1, "145"), (1, "12"), (1, "0.67"), (1, "[2007, 2008]")]
    assert BENCHMARKS["mathvista"].protocol().figures(found) == {"skills": {"scientific reasoning": 100}}


def test_the_leaderboard_of_seedbench_takes_lines(tmp_path):
    found = results("seedbench", tmp_path, ["B", "d", "x"])
    assert [result.mark.score for result in found] == [1, 1, 0]
    assert BENCHMARKS["seedbench"].submission(found)[1] == {"question_id": "v12", "prediction": "d"}


PROMPTS = """
import pathlib, yaml
import lmms_eval

yaml.SafeLoader.add_constructor("!function", lambda loader, node: None)

def task(name):
    path = pathlib.Path(lmms_eval.__path__[0]) / "tasks" / name
    config = yaml.safe_load(path.read_text())
    if "include" in config:
        config = {**yaml.safe_load((path.parent / config["include"]).read_text()), **config}
    given = config.get("lmms_eval_specific_kwargs")
    return config, None if given is None else {**given, **given.get("default", {})}

def prompts(function, name, rows):
    config, given = task(name)
    texts = [function(row) if given is None else function(row, given) for row in rows]
    return [texts, config["generation_kwargs"].get("max_new_tokens", 1024)]

def main(rows):
    from lmms_eval.tasks.ai2d import utils as ai2d
    from lmms_eval.tasks.mathvista import utils as mathvista
    from lmms_eval.tasks.mmmu import utils as mmmu
    from lmms_eval.tasks.scienceqa import utils as scienceqa
    from lmms_eval.tasks.seedbench import utils as seedbench
    asked = {
        "scienceqa": prompts(scienceqa.sqa_doc_to_text, "scienceqa/scienceqa.yaml", rows["scienceqa"]),
        "ai2d": prompts(ai2d.ai2d_doc_to_text, "ai2d/ai2d.yaml", rows["ai2d"]),
        "seedbench": prompts(seedbench.seed_doc_to_text, "seedbench/seedbench.yaml", rows["seedbench"]),
        "mmmu": prompts(mmmu.mmmu_doc_to_text, "mmmu/mmmu_val.yaml", rows["mmmu"]),
        "mmmu-test": prompts(mmmu.mmmu_doc_to_text, "mmmu/mmmu_test.yaml", rows["mmmu"]),
    }
    for form in ("cot", "solution", "format"):
        name = f"mathvista/mathvista_testmini_{form}.yaml"
        asked[f"mathvista {form}"] = prompts(mathvista.mathvista_doc_to_text, name, rows["mathvista"])
    if rows["new"]:
        from lmms_eval.tasks.cv_bench import utils as cv_bench
        from lmms_eval.tasks.mmbench import en_utils as mmbench
        mmbench.pd.notna = lambda value: value is not None
        asked["cvbench-2d"] = prompts(cv_bench.cv_bench_doc_to_text, "cv_bench/cv_bench_2d.yaml", rows["cvbench-2d"])
        asked["mmbench"] = prompts(mmbench.mmbench_doc_to_text, "mmbench/mmbench_en_dev_static.yaml", rows["mmbench"])
        _, given = task("mmmu/mmmu_val.yaml")
        images = [{f"image_{i}": Image(i - 1) for i in range(1, 8)} for _ in rows["mmmu"]]
        messages = [mmmu.mmmu_doc_to_messages({**row, **i}, given) for row, i in zip(rows["mmmu"], images)]
        parts = [[part.get("text", part.get("url")) for part in message[0]["content"]] for message in messages]
        asked["mmmu interleaved"] = [parts, 128]
    return asked

class Image(int):
    convert = lambda self, mode: int(self)
"""


def written(turns):
    """The text of a question as LLaVA's model of lmms-eval has it, with "<image>" for an image."""
    ((role, content),) = turns
    assert role == "user"
    return "".join("<image>" if isinstance(part, int) else part for part in content)


def in_front(text, count):
    return " ".join(["<image>"] * count) + f"\n{text}" if count else text


@pytest.mark.parametrize("version", harness.LMMS_EVAL)
def test_prompts_of_lmms_eval(version, tmp_path):
    new = version == "lmms-eval-0.7.3"
    names = ("scienceqa", "ai2d", "seedbench", "mmmu", "mathvista", "cvbench-2d", "mmbench")
    rows = {name: hub(name, tmp_path / name) for name in names}
    images = ("image", "decoded_image", *IMAGE_COLUMNS["mmmu"])
    docs = {name: [without(row, *images) for row in HUB[name][1]] for name in names}
    theirs = harness.ask(version, PROMPTS, {**docs, "new": new})
    rows["mmmu-test"] = rows["mmmu"]
    for name, (texts, max_tokens) in theirs.items():
        benchmark, _, form = name.partition(" ")
        variant = {"solution": "-solution", "format": "-format", "interleaved": "-interleaved"}.get(form, "")
        if not new and benchmark in ("scienceqa", "mathvista"):  # the paper's protocol is another, or there is none
            protocol = BENCHMARKS[benchmark].protocol(f"lmms-eval{variant}")
        else:
            protocol = BENCHMARKS[benchmark].protocol(f"lmms-eval{variant}" if new else "paper")
            assert protocol.max_tokens == max_tokens, name
        asked = [protocol.prompt(row) for row in rows[benchmark]]
        if form == "interleaved":
            assert [list(turns[0][1]) for turns in asked] == texts
        else:
            expected = [in_front(text, len(row.pictures)) for text, row in zip(texts, rows[benchmark], strict=True)]
            assert [written(turns) for turns in asked] == expected, name
    assert set(theirs) >= {"scienceqa", "mathvista format", *(("mmbench", "mmmu interleaved") if new else ())}


def test_each_mark_of_mmmu_gets_the_image_of_its_number(tmp_path):
    row = mmmu("validation_Art_1", "A <image 2> B <image 1> C <image 1> D", "[]", "x", RED, BLUE)
    parquet(tmp_path / "validation-00000-of-00001.parquet", [row], IMAGE_COLUMNS["mmmu"])
    (row,) = read("mmmu", tmp_path)
    content = BENCHMARKS["mmmu"].protocol("lmms-eval-interleaved").prompt(row)[0][1]
    end = "D\n\nAnswer the question using a single word or phrase."
    assert content == ("A", 1, "B", 0, "C", 0, end) and [picture.read() for picture in row.pictures] == [RED, BLUE]


def test_prompts_of_llava(tmp_path):
    rows = hub("scienceqa", tmp_path / "scienceqa")
    for name in ("paper", "llava"):
        assert [written(BENCHMARKS["scienceqa"].protocol(name).prompt(row)) for row in rows] == [
            f"<image>\nContext: N/A\nQuestion: Which?\nOptions: (A) leaf (B) frog (C) root{SENTENCE}",
            f"Context: Read this.\nQuestion: What is this? \nOptions: (A) a x (B) y{SENTENCE}",
            "<image>\nContext: Look.\nTwice.\nQuestion: Where?\nOptions: (A) here (B) there (C) C (D) D (E) E"
            + SENTENCE,
        ]
    rows = hub("mmbench", tmp_path / "mmbench")
    assert [written(BENCHMARKS["mmbench"].protocol("llava").prompt(row)) for row in rows] == [
        f"<image>\nWhich?\nA. cat\nB. dog{SENTENCE}",
        f"<image>\nA hint.\nWhat is  it? \nA. 1\nB. 2\nC. none of it\nD. 4{SENTENCE}",
        f"<image>\nWhich?\nA. dog\nB. cat{SENTENCE}",
    ]
    # LLaVA takes "None" for an empty cell.
    none = dataclasses.replace(rows[1], fields={**rows[1].fields, "C": "None"})
    asked = written(BENCHMARKS["mmbench"].protocol("llava").prompt(none))
    assert asked == f"<image>\nA hint.\nWhat is  it? \nA. 1\nB. 2{SENTENCE}"
    row = hub("seedbench-image", tmp_path / "seedbench")[0]
    asked = written(BENCHMARKS["seedbench-image"].protocol("llava").prompt(row))
    assert asked == f"<image>\nHow many towels?\nA. One\nB. Two\nC. Three\nD. Four{SENTENCE}"


@pytest.mark.parametrize(
    "name, words",
    [
        ("cvbench", "does not say which harness"),
        ("cvbench-2d", "does not say which harness"),
        ("mathvista", "which of lmms-eval's three prompts"),
        ("mmbench", "asks a judge"),
        ("ai2d-no-mask", "only the form with masks"),
    ],
)
def test_the_paper_protocol_is_refused_by_name(name, words):
    with pytest.raises(ValueError, match=words):
        BENCHMARKS[name].protocol("paper")
    assert BENCHMARKS[name].protocol().name == "lmms-eval"
