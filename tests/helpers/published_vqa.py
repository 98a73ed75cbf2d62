"""Small files of GQA, TextVQA, VQAv2 and POPE, in every layout in which they are published."""

from published_files import BLUE, RED, dump, dump_lines, parquet, save, without

SHORT = "\nAnswer the question using a single word or phrase."
GQA_FILE, GQA_LLAVA = "testdev_balanced_questions.json", "llava_gqa_testdev_balanced.jsonl"
GQA_TABLE = "testdev_balanced_instructions/testdev-00000-of-00001.parquet"
GQA_IMAGES = "testdev_balanced_images/testdev-00000-of-00001.parquet"
TEXT_FILE, TEXT_LLAVA = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"
TEXT_TABLE = "data/validation-00000-of-00001.parquet"
VQA_ANSWERS, VQA_TABLE = "v2_mscoco_val2014_annotations.json", "data/validation-00000-of-00002.parquet"
DEV_TABLE, TEST_FILE = "data/testdev-00000-of-00001.parquet", "v2_OpenEnded_mscoco_test2015_questions.json"
POPE_TABLE, POPE_FILE = "data/test-00000-of-00001.parquet", "coco/coco_pope_random.json"

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


def llava(question_id, image, text, category="default"):
    return {"question_id": question_id, "image": image, "text": text + SHORT, "category": category}


def hub_gqa(folder):
    parquet(folder / GQA_TABLE, GQA)
    images = [{"id": "n2", "image": BLUE}, {"id": "n161313", "image": RED}]
    parquet(folder / GQA_IMAGES, images)


def official_gqa(folder, data="."):
    dump(folder / data / GQA_FILE, {row["id"]: without(row, "id") for row in GQA})
    save(folder / data / "images/n161313.jpg", RED)
    save(folder / data / "images/n2.jpg", BLUE)


def llava_gqa(folder):
    official_gqa(folder, "data")
    rows = [llava(row["id"], f"{row['imageId']}.jpg", row["question"]) for row in GQA]
    dump_lines(folder / GQA_LLAVA, rows)


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
    dump_lines(folder / TEXT_LLAVA, rows[::-1])


def photos(folder, split):
    for number, data in PHOTOS.items():
        save(folder / f"{split}/COCO_{split}_{number:012d}.jpg", data)


def hub_vqav2(folder):
    parquet(folder / VQA_TABLE, VQAV2[:1])
    parquet(folder / "data/validation-00001-of-00002.parquet", VQAV2[1:])


def official_vqav2(folder):
    names = ("question_id", "image_id", "question")
    questions = [{name: row[name] for name in names} for row in VQAV2]
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    answers = [without(row, "question", "image") for row in VQAV2[::-1]]
    dump(folder / VQA_ANSWERS, {"annotations": answers})
    photos(folder, "val2014")


def hub_testdev(folder):
    rows = [{name: row[name] for name in ("question_id", "image_id", "question", "image")} for row in VQAV2]
    parquet(folder / DEV_TABLE, rows)
    parquet(
        folder / "data/test-00000-of-00001.parquet", [{**OTHERS[0], "image": RED}, *rows, {**OTHERS[1], "image": RED}]
    )


def official_testdev(folder):
    questions = [{name: row[name] for name in ("question_id", "image_id", "question")} for row in VQAV2]
    every = [OTHERS[0], *questions, OTHERS[1]]
    dump(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
    dump(folder / TEST_FILE, {"questions": every})
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
    parquet(folder / POPE_TABLE, POPE)


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
