"""The benchmarks with options: rows from files in every layout, and the prompts of lmms-eval and LLaVA."""

import dataclasses
import json
import random

import harness
import pytest
from etils import epath
from published_files import encoded, parquet, png, save, table

from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS

RED, BLUE, GREEN = png("red"), png("blue"), png("green")
SENTENCE = "\nAnswer with the option's letter from the given choices directly."
ABOUT = {
    "language": "english", "source": "SciBench", "category": "math-targeted-vqa", "task": "textbook",
    "grade": "college", "context": "scientific figure", "skills": ["scientific reasoning"], "split": "testmini",
}  # fmt: skip


def science(question, choices, answer, hint="", image=None, subject="natural science"):
    return {"question": question, "choices": choices, "answer": answer, "hint": hint, "image": image,
            "subject": subject, "grade": "grade5", "lecture": "", "solution": ""}  # fmt: skip


def seed(number, question, choices, answer, kind="image", image=(RED,), type_id=5):
    named = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), choices, strict=True))
    return {"question_id": number, "question": question, **named, "answer": answer, "data_type": kind,
            "data_id": f"data_{number}", "question_type_id": type_id, "image": list(image)}  # fmt: skip


def bench(index, question, a, b, c, d, answer, hint, image, category="object_localization"):
    return {"index": index, "question": question, "hint": hint, "A": a, "B": b, "C": c, "D": d, "answer": answer,
            "category": category, "image": image, "source": "s", "L2-category": "finegrained", "comment": "nan",
            "split": "dev"}  # fmt: skip


def cv(idx, kind, source, choices, answer, image):
    letters = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", choices, strict=False))
    return {"idx": idx, "type": kind, "task": "Count", "question": "How many organs?", "choices": choices,
            "answer": answer, "prompt": f"How many organs? Select from the following choices.\n{letters}",
            "source": source, "filename": f"img/{kind}/{idx}.png", "image": image}  # fmt: skip


def mmmu(identity, question, options, answer, *images):
    return {"id": identity, "question": question, "options": options, "answer": answer, "explanation": "",
            "question_type": "open" if options == "[]" else "multiple-choice", "subfield": "s",
            **{f"image_{i}": images[i - 1] if i <= len(images) else None for i in range(1, 8)}}  # fmt: skip


def vista(pid, question, answer, kind, choices=None, precision=None, unit=None):
    return {"pid": pid, "question": question, "image": f"images/{pid}.jpg", "decoded_image": RED, "choices": choices,
            "unit": unit, "precision": precision, "answer": answer, "answer_type": kind, "metadata": ABOUT,
            "question_type": "multi_choice" if choices else "free_form", "query": "q"}  # fmt: skip


SCIENCE = [
    science("Which?", ["leaf", "frog", "root"], 1, image=RED),
    science("What  is this? ", ["a  x", "y"], 0, "Read  this. ", subject="social science"),
    science("Where?", ["here", "there", "C", "D", "E"], 4, "Look.\nTwice.", image=BLUE),
]
AI2D = [
    {"question": "What is B?", "options": ["leaf", "frog", "root", "stem"], "answer": "1", "image": RED},
    {"question": "Which eats A? ", "options": ["hawk", "1", "none", "A, B"], "answer": "3", "image": BLUE},
]
SEED = [
    seed("101669", "How many towels?", ["One", "Two", "Three", "Four"], "B"),
    seed("v12", "What is done? ", ["cut", "pour", "mix", "none"], "D", "video", (RED, BLUE, GREEN), 11),
    seed("7", "Who?", ["a", "b", "c", "d"], "A", image=(GREEN,), type_id=1),
]
MMBENCH = [
    bench(241, "Which?", "cat", "dog", "nan", "nan", "B", "nan", RED),
    bench(242, "What is  it? ", "1", "2", "none of it", "4", "A", "A hint.", BLUE, "other"),
    bench(1000241, "Which?", "dog", "cat", "nan", "nan", "A", "nan", RED),
]
CV = [
    cv(0, "2D", "ADE20K", ["3", "2"], "(B)", RED), cv(1, "2D", "COCO", ["3", "2", "1", "0"], "(A)", BLUE),
    cv(0, "3D", "Omni3D", ["near", "far"], "(A)", GREEN),
]  # fmt: skip
MMMU = [
    mmmu("validation_Accounting_1", "What is <image 1>?", "['$6', '$7', \"it's\", '$9']", "B", RED),
    mmmu("validation_Accounting_2", "<image 1> Add it.", "[]", "['24/7', '3.429']", BLUE, GREEN),
    mmmu(
        "validation_Art_Theory_1", "Which of <image 1> and <image 2>?", "['<image 3>', 'none']", "A", RED, BLUE, GREEN
    ),
]
MATHVISTA = [
    vista("1", "How many?", "1.2", "float", precision=1.0, unit="g"),
    vista("2", "What is x? ", "145", "text", ["45", "145"]),
    vista("3", "How old?", "12", "integer", unit="$"),
    vista("4", "How long?", "0.67", "float", precision=2.0),
    vista("5", "When?", "[2007, 2008]", "list"),
]
HUB = {
    "scienceqa": ("ScienceQA-FULL/test-00000-of-00001.parquet", SCIENCE),
    "scienceqa-img": ("ScienceQA-IMG/test-00000-of-00001.parquet", [SCIENCE[0], SCIENCE[2]]),
    "ai2d": ("data/test-00000-of-00001.parquet", AI2D),
    "ai2d-no-mask": ("ai2d-no-mask/data/test-00000-of-00001.parquet", AI2D),
    "seedbench-image": ("data/test-00000-of-00001.parquet", SEED),
    "seedbench": ("data/test-00000-of-00001.parquet", SEED),
    "mmbench": ("en/dev-00000-of-00001.parquet", [{**row, "index": str(row["index"])} for row in MMBENCH]),
    "cvbench-2d": ("test_2d.parquet", CV[:2]),
    "mmmu": ("data/validation-00000-of-00001.parquet", MMMU),
    "mathvista": ("data/testmini-00000-of-00001.parquet", MATHVISTA),
}
IMAGES = {"mmmu": [f"image_{i}" for i in range(1, 8)], "mathvista": ["decoded_image"]}


def dump(path, value):
    save(path, json.dumps(value).encode())


def bare(row, *names):
    return {key: value for key, value in row.items() if key not in ("image", *names)}


def official_scienceqa(folder):
    problems = {
        str(5 + i): {**row, "image": row["image"] and "image.png", "split": "test"} for i, row in enumerate(SCIENCE)
    }
    dump(folder / "problems.json", {"1": {"split": "train"}, **problems})
    dump(folder / "pid_splits.json", {"train": ["1"], "test": ["5", "6", "7"], "minitest": ["5"]})
    save(folder / "images/test/5/image.png", RED)
    save(folder / "images/test/7/image.png", BLUE)


def table_ai2d(folder, name="AI2D_TEST.tsv"):
    rows = [
        {"index": i, "image": encoded(row["image"]), "question": row["question"], "category": "foodWeb",
         "answer": "ABCD"[int(row["answer"])], **dict(zip("ABCD", row["options"], strict=True))}
        for i, row in enumerate(AI2D)
    ]  # fmt: skip
    table(folder / name, rows, list(rows[0]))


def official_seedbench(folder):
    questions = [bare(row) for row in SEED]
    dump(folder / "SEED-Bench.json", {"questions": questions, "question_type": {"Instances Counting": 5}})
    names = {"101669": "SEED-Bench-image/data_101669", "v12": "SEED-Bench-video-image/11_v12.png",
             "7": "SEED-Bench-image/data_7"}  # fmt: skip
    asked = [
        {"question_id": int(key) if key.isdigit() else key, "image": name, "text": "t"} for key, name in names.items()
    ]
    save(folder / "llava-seed-bench.jsonl", "\n".join(map(json.dumps, asked)).encode())
    for name, image in zip(names.values(), (RED, BLUE, GREEN), strict=True):
        save(folder / name, image)


def table_mmbench(folder):
    rows = [
        {key: "" if value == "nan" else value for key, value in bare(row, "L2-category").items()}
        | {"image": "241" if row["index"] == 1000241 else encoded(row["image"]), "l2-category": row["L2-category"]}
        for row in MMBENCH
    ]
    table(folder / "mmbench_dev_20230712.tsv", rows, list(rows[0]))


def lists_cvbench(folder):
    for kind in ("2D", "3D"):
        rows = [row for row in CV if row["type"] == kind]
        save(folder / f"test_{kind.lower()}.jsonl", "\n".join(json.dumps(bare(row)) for row in rows).encode())
        for row in rows:
            save(folder / row["filename"], row["image"])


def subjects_mmmu(folder):
    parquet(folder / "Accounting/validation-00000-of-00001.parquet", MMMU[:2], IMAGES["mmmu"])
    parquet(folder / "Art_Theory/validation-00000-of-00001.parquet", MMMU[2:], IMAGES["mmmu"])


def official_mathvista(folder):
    dump(
        folder / "testmini.json",
        {row["pid"]: bare(row, "decoded_image") | {"image": row["image"]} for row in MATHVISTA},
    )
    for row in MATHVISTA:
        save(folder / row["image"], RED)


OTHER = {
    "scienceqa": official_scienceqa,
    "scienceqa-img": official_scienceqa,
    "ai2d": table_ai2d,
    "ai2d-no-mask": lambda folder: table_ai2d(folder, "AI2D_TEST_NO_MASK.tsv"),
    "seedbench-image": official_seedbench,
    "seedbench": official_seedbench,
    "mmbench": table_mmbench,
    "cvbench-2d": lists_cvbench,
    "mmmu": subjects_mmmu,
    "mathvista": official_mathvista,
}


def hub(name, folder):
    """Writes the hub's files of a benchmark, and returns its rows."""
    path, rows = HUB[name]
    parquet(folder / path, rows, IMAGES.get(name, ["image"]))
    return BENCHMARKS[name].read(epath.Path(folder / path.split("/")[0] if "no-mask" in path else folder))


def plain(row, identity=True):
    found = dataclasses.asdict(dataclasses.replace(row, pictures=()))
    found |= {"pictures": [picture.read() for picture in row.pictures]}
    return found if identity else {key: value for key, value in found.items() if key != "id"}


@pytest.mark.parametrize("name", HUB)
def test_layouts_give_the_same_rows_in_the_same_order(name, tmp_path):
    OTHER[name](tmp_path / "other")
    rows, other = hub(name, tmp_path / "hub"), BENCHMARKS[name].read(epath.Path(tmp_path / "other"))
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
    rows = BENCHMARKS["cvbench"].read(epath.Path(tmp_path))
    assert [row.id for row in rows] == ["2D-0", "2D-1", "3D-0"]
    assert BENCHMARKS["cvbench-3d"].read(epath.Path(tmp_path)) == rows[2:]


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
    parquet(tmp_path / "data/test-00000-of-00001.parquet", rows, IMAGES["mmmu"])
    found = BENCHMARKS["mmmu-test"].read(epath.Path(tmp_path))
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
    docs = {name: [bare(row, "decoded_image", *IMAGES["mmmu"]) for row in HUB[name][1]] for name in names}
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
    parquet(tmp_path / "validation-00000-of-00001.parquet", [row], IMAGES["mmmu"])
    (row,) = BENCHMARKS["mmmu"].read(epath.Path(tmp_path))
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


def test_the_forms_of_ai2d_are_never_mixed(tmp_path):
    table_ai2d(tmp_path / "one", "AI2D_TEST_NO_MASK.tsv")
    table_ai2d(tmp_path / "two")
    parquet(tmp_path / "AI2D-no-mask/data/test-00000-of-00001.parquet", AI2D)
    parquet(tmp_path / "three/data/test-00000-of-00001.parquet", AI2D)
    for form, folder, held in (
        ("ai2d", "one", "ai2d-no-mask"),
        ("ai2d", "AI2D-no-mask", "ai2d-no-mask"),
        ("ai2d-no-mask", "two", "ai2d"),
        ("ai2d-no-mask", "three", "ai2d"),
    ):
        with pytest.raises(FileNotFoundError, match=f"holds {held}, .* pass --benchmark={held}(;|$)"):
            BENCHMARKS[form].read(epath.Path(tmp_path / folder))


def changed(name, row, **values):
    path, rows = HUB[name]
    rows = [{**old, **values} if i == row else old for i, old in enumerate(rows)]
    return path, [{key: value for key, value in old.items() if value is not KeyError} for old in rows]


@pytest.mark.parametrize(
    "name, row, values, words",
    [
        ("scienceqa", 0, {"answer": 3}, "row 0: answer is 3, not the index of one of its 3 options"),
        ("scienceqa", 0, {"choices": []}, "row 0: choices is an empty list"),
        ("scienceqa", 1, {"image": RED}, "it is ScienceQA-IMG"),
        ("scienceqa-img", 0, {"hint": None, "choices": ["x"] * 27}, "27 options, more than letters"),
        ("ai2d", 1, {"answer": "x"}, "row 1: answer is 'x', not the index"),
        ("ai2d", 1, {"image": None}, "row 1, id '1', has no image"),
        ("seedbench", 0, {"answer": "E"}, "row 0: answer is 'E', the letter of none of its options"),
        ("seedbench", 0, {"question_id": "7"}, "the id '7' of row 2 stands twice"),
        ("seedbench", 1, {"image": []}, "row 1, id 'v12', has no image"),
        ("mmbench", 0, {"answer": "C"}, "row 0: answer is 'C', the letter of none of its options"),
        ("mmbench", 0, {"index": "x"}, "row 0: index is 'x', not a number"),
        ("cvbench-2d", 0, {"answer": "(C)"}, "row 0: answer is 'C', the letter of none of its options"),
        ("mmmu", 0, {"options": "['a', __import__('os')]"}, "options is not a list in Python's notation"),
        ("mmmu", 0, {"options": "[" * 100000}, "options is not a list in Python's notation"),
        ("mmmu", 0, {"image_1": None}, "image_1, which the question marks, is null"),
        ("mmmu", 0, {"id": "x_1"}, "its id names none of the 30 subjects"),
        ("mmmu", 0, {"question_type": "essay"}, "question_type is 'essay'"),
        ("mathvista", 0, {"precision": 3.0}, "answer_type is 'float' of precision 3.0"),
        ("mathvista", 0, {"precision": float("nan")}, "answer_type is 'float' of precision nan"),
        ("mathvista", 1, {"choices": None}, "question_type is 'multi_choice', with 0 choices"),
    ],
)
def test_a_bad_row_is_one_line(name, row, values, words, tmp_path):
    path, rows = changed(name, row, **values)
    parquet(tmp_path / path, rows, IMAGES.get(name, ["image"]))
    with pytest.raises(ValueError, match=words) as error:
        BENCHMARKS[name].read(epath.Path(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HUB)
def test_a_missing_column_and_a_wrong_layout_are_one_line(name, tmp_path):
    path, rows = HUB[name]
    column = {"mmmu": "image_4", "mathvista": "decoded_image"}.get(name, "image")
    parquet(
        tmp_path / path,
        [{key: v for key, v in row.items() if key != column} for row in rows],
        IMAGES.get(name, ["image"]),
    )
    folder = epath.Path(tmp_path / path.split("/")[0] if "no-mask" in path else tmp_path)
    with pytest.raises(ValueError, match=f"has no column {column}: it has ") as error:
        BENCHMARKS[name].read(folder)
    assert "\n" not in str(error.value)
    save(tmp_path / "empty/other.txt", b"x")
    with pytest.raises(FileNotFoundError, match=r"holds 'other\.txt': expected are ") as error:
        BENCHMARKS[name].read(epath.Path(tmp_path / "empty"))
    assert "\n" not in str(error.value) and all(line in str(error.value) for line in BENCHMARKS[name].files)


@pytest.mark.parametrize(
    "name, remove, words",
    [
        ("scienceqa", "images/test/5/image.png", "images/test lacks 1 of 2 images, the first '5/image.png'"),
        ("scienceqa", "pid_splits.json", "pid_splits.json"),
        (
            "seedbench",
            "SEED-Bench-video-image/11_v12.png",
            "lacks 1 of 3 images, the first 'SEED-Bench-video-image/11_v12",
        ),
        ("seedbench", "llava-seed-bench.jsonl", "lacks llava-seed-bench.jsonl, which names the frames of the videos"),
        ("cvbench-2d", "img/2D/1.png", "lacks 1 of 2 images, the first 'img/2D/1.png'"),
        ("mathvista", "images/3.jpg", "lacks 1 of 5 images, the first 'images/3.jpg'"),
    ],
)
def test_a_missing_file_is_one_line(name, remove, words, tmp_path):
    OTHER[name](tmp_path)
    (tmp_path / remove).unlink()
    with pytest.raises(FileNotFoundError, match=words) as error:
        BENCHMARKS[name].read(epath.Path(tmp_path))
    assert "\n" not in str(error.value)


def test_images_of_seedbench_need_no_frames(tmp_path):
    official_seedbench(tmp_path)
    (tmp_path / "llava-seed-bench.jsonl").unlink()
    assert len(BENCHMARKS["seedbench-image"].read(epath.Path(tmp_path))) == 2


def test_a_table_with_a_short_row_is_one_line(tmp_path):
    table_ai2d(tmp_path)
    path = tmp_path / "AI2D_TEST.tsv"
    path.write_bytes(path.read_bytes().rsplit(b"\t", 2)[0])
    with pytest.raises(ValueError, match=r"AI2D_TEST\.tsv row 1 has 7 cells, and the head 9 names$"):
        BENCHMARKS["ai2d"].read(epath.Path(tmp_path))


def test_a_missing_problem_does_not_list_all_others(tmp_path):
    official_scienceqa(tmp_path)
    dump(tmp_path / "problems.json", {str(i): {} for i in range(100, 30000)})
    with pytest.raises(ValueError, match="has no 5: it has 100, 101, ") as error:
        BENCHMARKS["scienceqa"].read(epath.Path(tmp_path))
    assert len(str(error.value)) < 600


def test_questions_that_are_no_list_are_one_line(tmp_path):
    dump(tmp_path / "SEED-Bench.json", {"questions": {"1": "x"}})
    with pytest.raises(ValueError, match=r"questions is not a list of objects$"):
        BENCHMARKS["seedbench-image"].read(epath.Path(tmp_path))
