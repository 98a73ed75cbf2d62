"""GQA, VQAv2, TextVQA and POPE: files that are wrong, of another version or missing end in an error of one line."""

import pytest
from published_files import BLUE, RED, drop, dump, edit, edit_lines, nothing, parquet, read, save, without
from published_vqa import (
    DEV_TABLE,
    GQA,
    GQA_FILE,
    GQA_IMAGES,
    GQA_LLAVA,
    GQA_TABLE,
    OTHERS,
    POPE,
    POPE_FILE,
    POPE_TABLE,
    SHORT,
    TEN,
    TEST_FILE,
    TEXT_FILE,
    TEXT_LLAVA,
    TEXT_TABLE,
    TEXTVQA,
    VQA_ANSWERS,
    VQA_TABLE,
    VQAV2,
    full_pope,
    hub_gqa,
    hub_testdev,
    hub_textvqa,
    llava_gqa,
    llava_pope,
    llava_textvqa,
    official_gqa,
    official_pope,
    official_testdev,
    official_textvqa,
    official_vqav2,
)

SECOND = {**TEXTVQA[1], "image": None}
NO_IMAGE = [{"id": "n2", "image": BLUE}, {"id": "n161313", "image": None}]


def table(path, *rows):
    return lambda folder: parquet(folder / path, rows)


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
        (
            "gqa",
            llava_gqa,
            edit_lines(GQA_LLAVA, lambda v: v[1].update(text="Who?")),
            "question 1: its text ends in 'Who?'",
        ),
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
            edit_lines(TEXT_LLAVA, lambda v: v.pop(0)),
            "does not ask 'What is it?' of b9dc400eb20bad64",
        ),
        (
            "textvqa",
            llava_textvqa,
            edit_lines(TEXT_LLAVA, lambda v: v[0].update(text="Q?" + SHORT)),
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
            edit_lines(POPE_FILE, lambda v: v.pop(0)),
            "coco_pope_random.json is of another version than llava_pope_test.jsonl: it has 2 questions and llava_pope",
        ),
        (
            "pope-random",
            llava_pope,
            edit_lines(POPE_FILE, lambda v: v[1].update(text="Is there a car in the imange?")),
            "its question 2 is not 'Is there a car in the image?' of COCO_val2014_000000458752.jpg",
        ),
        (
            "pope",
            llava_pope,
            edit_lines(POPE_FILE, lambda v: v[0].update(question_id=4)),
            "its question 1 is not 'Is there a s",
        ),
        (
            "pope",
            llava_pope,
            edit_lines(POPE_FILE, lambda v: v[0].update(question_id=[1])),
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
            edit_lines(POPE_FILE, lambda v: v[2].update(label="maybe")),
            "answer 'maybe' is not yes or no",
        ),
        (
            "pope",
            official_pope,
            edit_lines(POPE_FILE, lambda v: v[2].pop("label")),
            "question 2 has no label: it has question_id",
        ),
        ("pope", official_pope, lambda folder: save(folder / POPE_FILE, b"[1]"), "line 1 holds no object"),
        (
            "pope",
            official_pope,
            edit_lines(POPE_FILE, lambda v: v[0].update(image="../x.jpg")),
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


def test_images_outside_the_folder_are_not_read(tmp_path):
    official_pope(tmp_path, lambda row: {**row, "image": "../secret.jpg"})
    save(tmp_path / "secret.jpg", RED)
    with pytest.raises(ValueError, match="leads out of the images' folder"):
        read("pope", tmp_path)[0].pictures[0].read()
