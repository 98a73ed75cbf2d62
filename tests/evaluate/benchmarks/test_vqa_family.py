"""GQA, VQAv2, TextVQA and POPE: rows from files in every layout, prompts, figures and submissions."""

import json

import harness
import pytest
from etils import epath
from published_files import parquet, png, save

from fastvlm_jax.evaluate import run, suite
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS

RED, BLUE = png("red"), png("blue")
SHORT = "\nAnswer the question using a single word or phrase."
TYPES = {"structural": "verify", "semantic": "attr", "detailed": "weatherVerify"}
GQA = [
    {"id": "201307251", "imageId": "n161313", "question": "Is it overcast?", "answer": "no", "types": TYPES},
    {"id": "202", "imageId": "n2", "question": "Who?", "answer": "man", "types": {**TYPES, "structural": "query"}},
    {"id": "203", "imageId": "n161313", "question": "Is it a  CAT?", "answer": "yes", "types": TYPES},
]
TEN = ["dakota", "dakota", "dakota", "dakota", "dakota digital", "dakota", "dakota", "DAKOTA", "dakota digital", "a"]
TEXTVQA = [
    {"image_id": "003a8ae2ef43b901", "question_id": 34602, "question": "what is the BRAND of NASA?", "answers": TEN,
     "ocr_tokens": ["DAKOTA", "DIGITAL"], "image": RED},
    {"image_id": "003a8ae2ef43b901", "question_id": 34603, "question": "who?", "answers": TEN[::-1],
     "ocr_tokens": ["DAKOTA", "DIGITAL"], "image": RED},
    {"image_id": "b9dc400eb20bad64", "question_id": 34604, "question": "What is it?", "answers": ["x"] * 10,
     "ocr_tokens": [], "image": BLUE},
]  # fmt: skip


def ten(*answers):
    return [{"answer": answers[i % len(answers)], "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]


VQAV2 = [
    {"question_type": "what color is the", "multiple_choice_answer": "red", "answers": ten("red", "dark red"),
     "image_id": 458752, "answer_type": "other", "question_id": 458752000, "question": "What color is the bus?",
     "image": RED},
    {"question_type": "is", "multiple_choice_answer": "yes", "answers": ten("the sky"), "image_id": 42,
     "answer_type": "other", "question_id": 42000, "question": "What is it?", "image": BLUE},
    {"question_type": "how many", "multiple_choice_answer": "2", "answers": ten("2"), "image_id": 42,
     "answer_type": "number", "question_id": 42001, "question": "How many?", "image": BLUE},
]  # fmt: skip
PHOTOS = {458752: RED, 42: BLUE}
OTHERS = [{"question_id": 7, "image_id": 1, "question": "Why?"}, {"question_id": 9, "image_id": 1, "question": "?"}]
POPE = [
    {"id": str(number), "question_id": str(key), "question": f"Is there a {name} in the image?", "answer": answer,
     "image_source": f"COCO_val2014_{photo:012d}", "image": PHOTOS[photo], "category": split}
    for number, (split, key, name, answer, photo) in enumerate(
        (split, key, *what)
        for split, whats in (
            ("adversarial", [("snowboard", "yes", 42), ("dog", "no", 42)]),
            ("popular", [("snowboard", "yes", 42), ("person", "no", 458752)]),
            ("random", [("snowboard", "yes", 42), ("car", "no", 458752), ("bus", "yes", 458752)]),
        )
        for key, what in enumerate(whats, 1)
    )
]  # fmt: skip


def dump(path, value):
    save(path, json.dumps(value).encode())


def dump_lines(path, rows):
    save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def without(row, *names):
    return {key: value for key, value in row.items() if key not in names}


def llava(question_id, image, text, category="default"):
    return {"question_id": question_id, "image": image, "text": text + SHORT, "category": category}


def hub_gqa(folder):
    parquet(folder / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", GQA)
    images = [{"id": "n2", "image": BLUE}, {"id": "n161313", "image": RED}]
    parquet(folder / "testdev_balanced_images/testdev-00000-of-00001.parquet", images)


def official_gqa(folder, data="."):
    dump(folder / data / "testdev_balanced_questions.json", {row["id"]: without(row, "id") for row in GQA})
    save(folder / data / "images/n161313.jpg", RED)
    save(folder / data / "images/n2.jpg", BLUE)


def llava_gqa(folder):
    official_gqa(folder, "data")
    rows = [llava(row["id"], f"{row['imageId']}.jpg", row["question"]) for row in GQA]
    dump_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)


def hub_textvqa(folder, split="validation"):
    rows = TEXTVQA if split == "validation" else [{**row, "answers": [""] * 10} for row in TEXTVQA]
    parquet(folder / f"data/{split}-00000-of-00001.parquet", rows)


def official_textvqa(folder, split="val", images="train_images"):
    rows = [without(row, "ocr_tokens", "image", *(["answers"] if split == "test" else [])) for row in TEXTVQA]
    dump(folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": rows})
    for row in TEXTVQA:
        save(folder / images / f"{row['image_id']}.jpg", row["image"])


def llava_textvqa(folder):
    official_textvqa(folder)
    rows = [
        llava(
            row["image_id"],
            f"{row['image_id']}.jpg",
            f"{question}\nReference OCR token: {', '.join(row['ocr_tokens'])}",
        )
        for row, question in zip(TEXTVQA, ["What is the BRAND of NASA?", "who?", "What is it?"], strict=True)
    ]
    dump_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows[::-1])


def photos(folder, split):
    for number, data in PHOTOS.items():
        save(folder / f"{split}/COCO_{split}_{number:012d}.jpg", data)


def hub_vqav2(folder):
    parquet(folder / "data/validation-00000-of-00002.parquet", VQAV2[:1])
    parquet(folder / "data/validation-00001-of-00002.parquet", VQAV2[1:])


def official_vqav2(folder):
    names = ("question_id", "image_id", "question")
    questions = [{name: row[name] for name in names} for row in VQAV2]
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    answers = [without(row, "question", "image") for row in VQAV2[::-1]]
    dump(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    photos(folder, "val2014")


def hub_testdev(folder):
    rows = [{name: row[name] for name in ("question_id", "image_id", "question", "image")} for row in VQAV2]
    parquet(folder / "data/testdev-00000-of-00001.parquet", rows)
    parquet(
        folder / "data/test-00000-of-00001.parquet", [{**OTHERS[0], "image": RED}, *rows, {**OTHERS[1], "image": RED}]
    )


def official_testdev(folder):
    questions = [{name: row[name] for name in ("question_id", "image_id", "question")} for row in VQAV2]
    every = [OTHERS[0], *questions, OTHERS[1]]
    dump(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
    dump(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": every})
    photos(folder, "test2015")


def llava_testdev(folder):
    rows = [
        llava(row["question_id"], f"COCO_test2015_{row['image_id']:012d}.jpg", row["question"])
        for row in [OTHERS[0], *VQAV2, OTHERS[1]]
    ]
    dump_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[1:-1])
    dump_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    photos(folder, "test2015")


def hub_pope(folder):
    parquet(folder / "data/test-00000-of-00001.parquet", POPE)


def full_pope(folder):
    for split in ("adversarial", "popular", "random"):
        rows = [row for row in POPE if row["category"] == split]
        parquet(folder / f"Full/{split}-00000-of-00001.parquet", rows)


def official_pope(folder, change=lambda row: row):
    for split in ("adversarial", "popular", "random"):
        rows = [
            {"question_id": int(row["question_id"]), "image": row["image_source"] + ".jpg", "text": row["question"],
             "label": row["answer"]}
            for row in POPE
            if row["category"] == split
        ]  # fmt: skip
        dump_lines(folder / f"coco/coco_pope_{split}.json", [change(row) for row in rows])
    photos(folder, "val2014")


def llava_pope(folder, change=lambda row: row):
    official_pope(folder, change)
    ids = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
    rows = [
        llava(
            ids[row["category"]] + int(row["question_id"]),
            f"{row['image_source']}.jpg",
            row["question"],
            row["category"],
        )
        for row in POPE
    ]
    dump_lines(folder / "llava_pope_test.jsonl", rows)


LAYOUTS = {
    "gqa": (hub_gqa, official_gqa, llava_gqa),
    "textvqa": (hub_textvqa, official_textvqa, llava_textvqa),
    "textvqa-test": (
        lambda folder: hub_textvqa(folder, "test"),
        lambda folder: official_textvqa(folder, "test", "test_images"),
    ),
    "vqav2": (hub_vqav2, official_vqav2),
    "vqav2-testdev": (hub_testdev, official_testdev, llava_testdev),
    **{f"pope{split}": (hub_pope, full_pope, official_pope, llava_pope) for split in ("", "-random", "-popular")},
}
IMAGES = {
    "gqa": [RED, BLUE, RED], "textvqa": [RED, RED, BLUE], "textvqa-test": [RED, RED, BLUE], "vqav2": [RED, BLUE, BLUE],
    "vqav2-testdev": [RED, BLUE, BLUE], "pope": [row["image"] for row in POPE], "pope-random": [BLUE, RED, RED],
    "pope-popular": [BLUE, RED],
}  # fmt: skip


def read(name, folder):
    return BENCHMARKS[name].read(epath.Path(folder))


def prompt(name, protocol, row):
    return BENCHMARKS[name].protocol(protocol).prompt(row)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_hold_the_same_rows_in_the_same_order(name, tmp_path):
    found = []
    for number, write in enumerate(LAYOUTS[name]):
        write(tmp_path / str(number))
        rows = read(name, tmp_path / str(number))
        assert [picture.read() for row in rows for picture in row.pictures] == IMAGES[name]
        found.append(
            [(row.id, row.question, row.references, row.groups, prompt(name, "lmms-eval", row)) for row in rows]
        )
    assert found[1:] == found[:-1]


@pytest.mark.parametrize(
    "name, number, row",
    [
        ("gqa", 0, ("201307251", "Is it overcast?", ("no",), {
            "structural": "verify", "semantic": "attr", "answers": "binary",
        })),
        ("gqa", 1, ("202", "Who?", ("man",), {"structural": "query", "semantic": "attr", "answers": "open"})),
        ("textvqa", 0, ("34602", "what is the BRAND of NASA?", tuple(TEN), {})),
        ("textvqa-test", 0, ("34602", "what is the BRAND of NASA?", None, {})),
        ("vqav2", 0, ("458752000", "What color is the bus?", ("red", "dark red") * 5, {"answer_type": "other"})),
        ("vqav2-testdev", 2, ("42001", "How many?", None, {})),
        ("pope", 4, ("random/1", "Is there a snowboard in the image?", ("yes",), {"category": "random"})),
        ("pope-popular", 1, ("popular/2", "Is there a person in the image?", ("no",), {"category": "popular"})),
    ],
)  # fmt: skip
def test_rows(name, number, row, tmp_path):
    LAYOUTS[name][0](tmp_path)
    found = read(name, tmp_path)[number]
    assert (found.id, found.question, found.references, found.groups) == row


PROMPTS = """
import inspect, os, yaml
from lmms_eval.tasks.gqa.utils import gqa_doc_to_text
from lmms_eval.tasks.pope.utils import pope_doc_to_text
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text

yaml.SafeLoader.add_multi_constructor("!", lambda loader, tag, node: None)

def asked(function, rows):
    folder = os.path.dirname(inspect.getsourcefile(function))
    name = os.path.basename(folder)
    files = [os.path.join(folder, file) for file in (f"_default_template_{name}_yaml", f"{name}.yaml")]
    config = yaml.safe_load(open(next(filter(os.path.exists, files))))
    given = config.get("lmms_eval_specific_kwargs", config.get("model_specific_prompt_kwargs"))
    more = [given["default"]] if len(inspect.signature(function).parameters) > 1 else []
    longest = config["generation_kwargs"].get("max_new_tokens", 1024)
    return {"texts": [function(row, *more) for row in rows], "max": longest}

def main(rows):
    functions = dict(gqa=gqa_doc_to_text, pope=pope_doc_to_text, textvqa=textvqa_doc_to_text, vqav2=vqav2_doc_to_text)
    return {name: asked(function, rows[name]) for name, function in functions.items()}
"""
ODD = ["Is it?", "What is the BRAND of NASA?", "ÉTÉ? ", " is\tthere\na dog? ", "", "straße ﬁ ǆ", "«Q» what?"]


@pytest.mark.parametrize("version", harness.LMMS_EVAL)
def test_prompts_of_lmms_eval(version, tmp_path):
    """Its model puts the image and a line break in front; `ask_lmms_eval` is tested with several images elsewhere."""
    names = ("gqa", "textvqa", "vqav2", "pope")
    for name in names:
        LAYOUTS[name][0](tmp_path / name)
    tables = dict(zip(names, (GQA, TEXTVQA, VQAV2, POPE), strict=True))
    odd = [{"question": text, "ocr_tokens": ["A"]} for text in ODD]
    docs = {name: [without(row, "image") for row in tables[name]] + odd for name in names}
    theirs = harness.ask(version, PROMPTS, docs)
    for name in names:
        rows = read(name, tmp_path / name)
        rows += [type(rows[0])(str(i), text, rows[0].pictures, None) for i, text in enumerate(ODD)]
        ours = BENCHMARKS[name].protocol("lmms-eval" if version == "lmms-eval-0.7.3" or name != "vqav2" else "paper")
        assert [ours.prompt(row) for row in rows] == [(("user", (0, f"\n{text}")),) for text in theirs[name]["texts"]]
        assert ours.max_tokens == theirs[name]["max"]
        assert version.removeprefix("lmms-eval-")[:3] == ours.version.removeprefix("lmms-eval ")[:3] or name != "vqav2"


@pytest.mark.parametrize("name", ["gqa", "textvqa", "pope", "vqav2-testdev"])
def test_prompts_of_llava_are_the_texts_of_its_files(name, tmp_path):
    """LLaVA's loader puts the image and a line break in front of `text`."""
    LAYOUTS[name][-1](tmp_path)
    (path,) = [path for path in tmp_path.glob("llava_*.jsonl") if "test2015" not in path.name]
    texts = sorted(json.loads(line)["text"] for line in path.read_text().splitlines())
    rows = read(name, tmp_path)
    assert sorted(prompt(name, "llava", row)[0][1][1] for row in rows) == ["\n" + text for text in texts]
    assert BENCHMARKS[name].protocol("llava").max_tokens == 128
    if name != "vqav2-testdev":
        assert [prompt(name, "paper", row) for row in rows] == [prompt(name, "llava", row) for row in rows]


def scored(name, protocol, rows, answers):
    protocol = BENCHMARKS[name].protocol(protocol)
    found = []
    for row, answer in zip(rows, answers, strict=True):
        mark = None if row.references is None else protocol.score(answer, row)
        found.append(Result(row, "", answer, mark, tuple(picture.name for picture in row.pictures)))
    return found


def test_textvqa_says_where_its_ocr_tokens_are_from(tmp_path):
    for number, write in enumerate((hub_textvqa, llava_textvqa, official_textvqa)):
        write(tmp_path / str(number))
    hub, llavas = (read("textvqa", tmp_path / str(number)) for number in range(2))
    assert prompt("textvqa", "paper", hub[0]) == (
        ("user", (0, f"\nwhat is the BRAND of NASA?\nReference OCR token: DAKOTA, DIGITAL{SHORT}")),
    )
    # LLaVA joins by the question in lower case, and asks it as its own file spells it.
    assert prompt("textvqa", "paper", llavas[0]) == (
        ("user", (0, f"\nWhat is the BRAND of NASA?\nReference OCR token: DAKOTA, DIGITAL{SHORT}")),
    )
    assert prompt("textvqa", "lmms-eval", hub[0]) == (("user", (0, f"\nWhat is the brand of nasa?{SHORT}")),)
    for rows, source in ((hub, "ocr_tokens of the Parquet files"), (llavas, "llava_textvqa_val_v051_ocr.jsonl")):
        results = scored("textvqa", "paper", rows, ["Dakota."] * 3)
        assert BENCHMARKS["textvqa"].protocol("paper").figures(results) == {"ocr_tokens": source}
        assert [result.mark.score for result in results] == [1, 1, 0] and results[0].mark.parsed == "dakota"
    results = scored("textvqa", "lmms-eval", hub, ["", "A dakota digital", "x"])
    assert BENCHMARKS["textvqa"].protocol("lmms-eval").figures(results) == {"ocr_tokens": "not in the prompt"}
    assert [result.mark.score for result in results] == pytest.approx(
        [0.3, 0.6, 1]
    )  # "a" is an article: nothing is left
    for protocol in ("paper", "llava"):
        with pytest.raises(
            ValueError, match=r"^textvqa: LLaVA's prompt lists the OCR tokens .*: add LLaVA's llava_textv"
        ):
            suite.choose(["textvqa"], tmp_path / "2", BENCHMARKS, protocol=protocol, told=print)
    assert len(suite.choose(["textvqa"], tmp_path / "2", BENCHMARKS, protocol="lmms-eval", told=print)[0].rows) == 3


def test_textvqa_of_the_hub_is_asked_as_llavas_file_does_where_it_is_there(tmp_path):
    llava_textvqa(tmp_path / "llava")
    hub_textvqa(tmp_path)
    hub_textvqa(tmp_path, "test")
    (tmp_path / "llava" / TEXT_LLAVA).rename(tmp_path / TEXT_LLAVA)
    rows = read("textvqa", tmp_path)
    assert {row.fields["ocr"] for row in rows} == {TEXT_LLAVA}
    assert prompt("textvqa", "paper", rows[0])[0][1][1].startswith(
        "\nWhat is the BRAND of NASA?\nReference OCR token: D"
    )
    assert {row.fields["ocr"] for row in read("textvqa-test", tmp_path)} == {"ocr_tokens of the Parquet files"}


def test_pope_reports_the_mean_of_the_f1_of_its_splits(tmp_path):
    hub_pope(tmp_path)
    rows = read("pope", tmp_path)
    answers = ["Yes", "yes there is", "Yes.", "No", "no", "NO", "yes"]
    paper, pooled = BENCHMARKS["pope"].protocol("paper"), BENCHMARKS["pope"].protocol("lmms-eval")
    results = scored("pope", "paper", rows, answers)
    # adversarial: 1 right yes, 1 wrong yes; popular: both right; random: 1 of 2 yes found, "NO" is read as yes
    assert paper.aggregate(results) == pytest.approx(100 * (2 / 3 + 1 + 0.5) / 3)
    assert paper.aggregate(results[:2]) == pytest.approx(200 / 3)
    found = paper.figures(results)
    assert list(found) == ["adversarial", "popular", "random"]
    assert found["adversarial"] == pytest.approx(
        {"f1": 200 / 3, "accuracy": 50, "precision": 50, "recall": 100, "yes_share": 100, "questions": 2}
    )
    results = scored("pope", "lmms-eval", rows, answers)
    assert [result.mark.parsed for result in results] == ["yes", None, None, "no", "no", "no", "yes"]
    found = pooled.figures(results)
    assert list(found) == ["all", "adversarial", "popular", "random"]
    assert found["adversarial"] == pytest.approx(
        {"f1": 100, "accuracy": 50, "precision": 100, "recall": 100, "yes_share": 50, "questions": 2, "yes_ratio": 50}
    )
    assert (found["all"]["yes_ratio"], found["all"]["questions"]) == (pytest.approx(400 / 7), 7)
    # 2 right yes, no wrong yes, 1 yes missed by "no"
    assert pooled.aggregate(results) == pytest.approx(100 * 2 * (1 * 2 / 3) / (1 + 2 / 3))


def test_marks_differ_by_protocol(tmp_path):
    hub_gqa(tmp_path / "gqa")
    hub_vqav2(tmp_path / "vqav2")
    gqa, vqav2 = read("gqa", tmp_path / "gqa"), read("vqav2", tmp_path / "vqav2")
    answers = ["No!", "the man", "Yes."]
    assert [result.mark for result in scored("gqa", "paper", gqa, answers)] == [(0, "no!"), (0, "the man"), (1, "yes")]
    assert [result.mark for result in scored("gqa", "lmms-eval", gqa, answers)] == [
        (1, "no"),
        (0, "the man"),
        (1, "yes"),
    ]
    answers = ["a dark red", "the sky", "two"]
    paper, newer = scored("vqav2", "paper", vqav2, answers), scored("vqav2", "lmms-eval", vqav2, answers)
    assert [result.mark for result in paper] == [(1, "dark red"), (0, "sky"), (1, "2")]
    assert [result.mark for result in newer] == [(1, "dark red"), (1, "sky"), (1, "2")]
    assert [result.mark for result in scored("vqav2", "llava", vqav2, answers)] == [result.mark for result in paper]


def test_submissions(tmp_path):
    made = {}
    for name, answers in (
        ("gqa", ["No.", "A man", "yes"]),
        ("textvqa-test", ["The Dakota,", "", "Two dogs, isnt it?"]),
    ):
        LAYOUTS[name][0](tmp_path / name)
        rows, protocol = read(name, tmp_path / name), BENCHMARKS[name].protocol("llava")
        entry = suite.Entry(BENCHMARKS[name], protocol, rows)
        suite.write(tmp_path, entry, run.Scored(scored(name, "llava", rows, answers), [], 3, 1.0), None, {}, True)
        made[name] = json.loads((tmp_path / f"{name}-llava.submission.json").read_text())
    assert made["gqa"] == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "202", "prediction": "a man"},
        {"questionId": "203", "prediction": "yes"},
    ]
    assert made["textvqa-test"] == [
        {"question_id": 34602, "answer": "dakota"},
        {"question_id": 34603, "answer": ""},
        {"question_id": 34604, "answer": "2 dogs isn't it"},
    ]


@pytest.mark.parametrize("write", LAYOUTS["vqav2-testdev"])
def test_submission_of_vqav2_answers_every_question_of_test2015(write, tmp_path):
    write(tmp_path)
    results = scored("vqav2-testdev", "paper", read("vqav2-testdev", tmp_path)[:2], ["Dark-red.", "The yes"])
    assert BENCHMARKS["vqav2-testdev"].submission(results) == [
        {"question_id": 7, "answer": ""},
        {"question_id": 458752000, "answer": "dark red"},
        {"question_id": 42000, "answer": "yes"},
        {"question_id": 42001, "answer": ""},
        {"question_id": 9, "answer": ""},
    ]


def nothing(folder):
    """Leaves the folder as it is."""


def drop(path):
    return lambda folder: (folder / path).unlink()


def table(path, *rows):
    return lambda folder: parquet(folder / path, rows)


def edit(path, change):
    """Changes the value of a JSON file, or the list of the objects of JSON lines, in place."""

    def apply(folder):
        text = (folder / path).read_text()
        if lines := path.endswith(".jsonl") or path.startswith("coco/"):
            value = [json.loads(line) for line in text.splitlines()]
        else:
            value = json.loads(text)
        change(value)
        (dump_lines if lines else dump)(folder / path, value)

    return apply


GQA_FILE, GQA_LLAVA = "testdev_balanced_questions.json", "llava_gqa_testdev_balanced.jsonl"
GQA_TABLE = "testdev_balanced_instructions/testdev-00000-of-00001.parquet"
GQA_IMAGES = "testdev_balanced_images/testdev-00000-of-00001.parquet"
TEXT_FILE, TEXT_LLAVA = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"
TEXT_TABLE = "data/validation-00000-of-00001.parquet"
VQA_ANSWERS, VQA_TABLE = "v2_mscoco_val2014_annotations.json", "data/validation-00000-of-00002.parquet"
DEV_TABLE, TEST_FILE = "data/testdev-00000-of-00001.parquet", "v2_OpenEnded_mscoco_test2015_questions.json"
POPE_TABLE, POPE_FILE = "data/test-00000-of-00001.parquet", "coco/coco_pope_random.json"
SECOND = {**TEXTVQA[1], "image": None}
NO_IMAGE = [{"id": "n2", "image": BLUE}, {"id": "n161313", "image": None}]


@pytest.mark.parametrize(
    "name, layout, change, words",
    [
        ("gqa", nothing, nothing, "there is no folder"),
        (
            "gqa",
            hub_textvqa,
            nothing,
            "holds 'data': expected are testdev_balanced_questions.json and the folder images",
        ),
        ("gqa", nothing, lambda folder: dump(folder / GQA_FILE, {}), "has no folder of images: expected is images"),
        ("gqa", official_gqa, drop("images/n2.jpg"), "lacks 1 of 2 images, the first 'n2.jpg'"),
        ("gqa", llava_gqa, drop(f"data/{GQA_FILE}"), "the answers are in GQA's testdev_balanced_questions.json"),
        ("gqa", official_gqa, lambda folder: dump(folder / GQA_FILE, {}), "holds no rows"),
        ("gqa", official_gqa, lambda folder: dump(folder / GQA_FILE, []), "holds no object"),
        ("gqa", official_gqa, edit(GQA_FILE, lambda v: v["202"].pop("answer")), "question '202' has no answer: it has"),
        ("gqa", official_gqa, edit(GQA_FILE, lambda v: v.update({"202": 1})), "question '202' holds no object"),
        ("gqa", llava_gqa, edit(f"data/{GQA_FILE}", lambda v: v.pop("203")), "no question '203', which llava_gqa"),
        ("gqa", llava_gqa, edit(GQA_LLAVA, lambda v: v[1].update(text="Who?")), "question 1: its text ends in 'Who?'"),
        ("gqa", hub_gqa, table(GQA_TABLE, *GQA, GQA[0]), "the id '201307251' of row 3 stands twice"),
        ("gqa", hub_gqa, table(GQA_TABLE, without(GQA[0], "answer")), "has no column answer: it has id, imageId"),
        ("gqa", hub_gqa, table(GQA_IMAGES, *NO_IMAGE), "testdev_balanced_images has no image 'n161313'"),
        ("gqa", hub_gqa, table(GQA_IMAGES, {"id": ["n2"], "image": BLUE}), "id is list, not a text"),
        ("gqa", hub_gqa, drop(GQA_IMAGES), "needs its images beside it: there are no Parquet files"),
        ("textvqa", nothing, table(TEXT_TABLE, {**TEXTVQA[0], "answers": TEN[:9]}), "row 0 has 9 answers, not 10"),
        (
            "textvqa",
            nothing,
            table(TEXT_TABLE, {**TEXTVQA[0], "ocr_tokens": [1]}),
            "row 0: ocr_tokens is not a list of",
        ),
        (
            "textvqa",
            nothing,
            table(TEXT_TABLE, {**TEXTVQA[0], "ocr_tokens": "A, B"}),
            "row 0: ocr_tokens is not a list",
        ),
        ("textvqa", nothing, table(TEXT_TABLE, TEXTVQA[0], SECOND), "row 1, id '34603', has no image"),
        ("textvqa", nothing, table(TEXT_TABLE, *TEXTVQA[:1] * 2), "the id '34602' of row 1 stands twice"),
        ("textvqa", nothing, table("validation-00000-of-00003.parquet", *TEXTVQA), "lacks validation-00001-of-00003"),
        (
            "textvqa",
            llava_textvqa,
            edit(TEXT_LLAVA, lambda v: v.pop(0)),
            "does not ask 'What is it?' of b9dc400eb20bad64",
        ),
        (
            "textvqa",
            llava_textvqa,
            edit(TEXT_LLAVA, lambda v: v[0].update(text="Q?" + SHORT)),
            "question 'Q?' has no line of OCR tokens",
        ),
        (
            "textvqa",
            lambda folder: official_textvqa(folder, images="val"),
            nothing,
            "folder of images: expected is train_i",
        ),
        ("textvqa", official_textvqa, edit(TEXT_FILE, lambda v: v.update(data=[1])), "data is not a list of objects"),
        (
            "textvqa",
            official_textvqa,
            edit(TEXT_FILE, lambda v: v["data"][1].update(question_id="x")),
            "row 1: question_id is 'x', not a whole number",
        ),
        ("vqav2", official_vqav2, drop(VQA_ANSWERS), "lacks v2_mscoco_val2014_annotations.json, which has the answers"),
        (
            "vqav2",
            official_vqav2,
            edit(VQA_ANSWERS, lambda v: v["annotations"].pop()),
            "question 0: v2_mscoco_val2014_annotations.json has no question_id 458752000",
        ),
        (
            "vqav2",
            official_vqav2,
            edit(VQA_ANSWERS, lambda v: v["annotations"][2]["answers"].pop()),
            "question 0 has 9 answers, not 10",
        ),
        (
            "vqav2",
            official_vqav2,
            edit(VQA_ANSWERS, lambda v: v["annotations"][2].update(answers=["red"])),
            "question 0: answers is list, not a list of objects",
        ),
        ("vqav2", nothing, table(VQA_TABLE, *VQAV2), "lacks validation-00001-of-00002.parquet: it has 1 of 2 parts"),
        ("vqav2", official_vqav2, drop("val2014/COCO_val2014_000000000042.jpg"), "lacks 1 of 2 images, the first"),
        (
            "vqav2-testdev",
            official_testdev,
            drop(TEST_FILE),
            "lacks the questions of test2015, all of which a submission",
        ),
        (
            "vqav2-testdev",
            official_testdev,
            edit(TEST_FILE, lambda v: v.update(questions=OTHERS)),
            "the list of test2015 has no question_id 458752000: it is of another version",
        ),
        ("vqav2-testdev", hub_testdev, table(DEV_TABLE, {**VQAV2[0], "image": None}), "id '458752000', has no image"),
        (
            "pope",
            llava_pope,
            edit(POPE_FILE, lambda v: v.pop(0)),
            "coco_pope_random.json is of another version than llava_pope_test.jsonl: it has 2 questions and llava_pope",
        ),
        (
            "pope-random",
            llava_pope,
            edit(POPE_FILE, lambda v: v[1].update(text="Is there a car in the imange?")),
            "its question 2 is not 'Is there a car in the image?' of COCO_val2014_000000458752.jpg",
        ),
        (
            "pope",
            llava_pope,
            edit(POPE_FILE, lambda v: v[0].update(question_id=4)),
            "its question 1 is not 'Is there a s",
        ),
        (
            "pope",
            llava_pope,
            edit(POPE_FILE, lambda v: v[0].update(question_id=[1])),
            "its question 1 is not 'Is there a",
        ),
        ("pope", official_pope, drop(POPE_FILE), "lacks coco/coco_pope_random.json, a split of POPE"),
        (
            "pope",
            full_pope,
            drop("Full/popular-00000-of-00001.parquet"),
            "lacks Full/popular-*.parquet, a split of POPE",
        ),
        (
            "pope",
            official_pope,
            edit(POPE_FILE, lambda v: v[2].update(label="maybe")),
            "answer 'maybe' is not yes or no",
        ),
        (
            "pope",
            official_pope,
            edit(POPE_FILE, lambda v: v[2].pop("label")),
            "question 2 has no label: it has question_id",
        ),
        ("pope", official_pope, lambda folder: save(folder / POPE_FILE, b"[1]"), "line 1 holds no object"),
        (
            "pope",
            official_pope,
            edit(POPE_FILE, lambda v: v[0].update(image="../x.jpg")),
            "lacks 1 of 3 images, the first",
        ),
        (
            "pope",
            nothing,
            table(POPE_TABLE, {**POPE[0], "category": "rare"}),
            "category 'rare' is not adversarial, popular",
        ),
        ("pope", nothing, table(POPE_TABLE, *POPE[:1] * 2), "the id 'adversarial/1' of row 1 stands twice"),
        ("pope", nothing, table(POPE_TABLE, {**POPE[0], "image": None}), "row 0, id 'adversarial/1', has no image"),
    ],
)
def test_bad_files_are_one_line(name, layout, change, words, tmp_path):
    folder = tmp_path / "data"
    layout(folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(name, folder)
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 450, message


def test_pope_without_llavas_file_asks_what_the_labels_ask(tmp_path):
    official_pope(tmp_path, lambda row: {**row, "text": row["text"].replace("image", "imange")})
    assert read("pope", tmp_path)[0].question == "Is there a snowboard in the imange?"


def test_labels_of_pope_in_any_case(tmp_path):
    official_pope(tmp_path, lambda row: {**row, "label": f"{row['label'].upper()} "})
    assert [row.references for row in read("pope-random", tmp_path)] == [("yes",), ("no",), ("yes",)]


def test_gqa_asks_what_llavas_file_asks(tmp_path):
    llava_gqa(tmp_path)
    edit(GQA_LLAVA, lambda rows: (rows.pop(0), rows[0].update(text="Who is it?" + SHORT)))(tmp_path)
    assert [row.question for row in read("gqa", tmp_path)] == ["Who is it?", "Is it a  CAT?"]


def test_images_outside_the_folder_are_not_read(tmp_path):
    official_pope(tmp_path, lambda row: {**row, "image": "../secret.jpg"})
    save(tmp_path / "secret.jpg", RED)
    with pytest.raises(ValueError, match="leads out of the images' folder"):
        read("pope", tmp_path)[0].pictures[0].read()
