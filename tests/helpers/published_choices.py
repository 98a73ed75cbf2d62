"""Small files of ScienceQA, AI2D, SEED-Bench, MMBench, CV-Bench, MMMU and MathVista, in every published layout.

`HUB` has the tables of the hub, as rows and the path they lie at, and `OTHER` the writers of the layouts beside it.
"""

import json

from published_files import BLUE, GREEN, RED, dump, encoded, parquet, read, save, table, without

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
IMAGE_COLUMNS = {"mmmu": [f"image_{i}" for i in range(1, 8)], "mathvista": ["decoded_image"]}


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
    questions = [without(row, "image") for row in SEED]
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
        {key: "" if value == "nan" else value for key, value in without(row, "image", "L2-category").items()}
        | {"image": "241" if row["index"] == 1000241 else encoded(row["image"]), "l2-category": row["L2-category"]}
        for row in MMBENCH
    ]
    table(folder / "mmbench_dev_20230712.tsv", rows, list(rows[0]))


def lists_cvbench(folder):
    for kind in ("2D", "3D"):
        rows = [row for row in CV if row["type"] == kind]
        lines = [json.dumps(without(row, "image")) for row in rows]
        save(folder / f"test_{kind.lower()}.jsonl", "\n".join(lines).encode())
        for row in rows:
            save(folder / row["filename"], row["image"])


def subjects_mmmu(folder):
    parquet(folder / "Accounting/validation-00000-of-00001.parquet", MMMU[:2], IMAGE_COLUMNS["mmmu"])
    parquet(folder / "Art_Theory/validation-00000-of-00001.parquet", MMMU[2:], IMAGE_COLUMNS["mmmu"])


def official_mathvista(folder):
    dump(
        folder / "testmini.json",
        {row["pid"]: without(row, "image", "decoded_image") | {"image": row["image"]} for row in MATHVISTA},
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


def write_hub(name, folder, rows=None):
    """Writes the hub's table of a benchmark, with other `rows` where they are given; returns the folder to read."""
    path, published = HUB[name]
    parquet(folder / path, published if rows is None else rows, IMAGE_COLUMNS.get(name, ["image"]))
    return folder / path.split("/")[0] if "no-mask" in path else folder


def hub(name, folder):
    """Writes the hub's table of a benchmark, and returns its rows."""
    return read(name, write_hub(name, folder))
