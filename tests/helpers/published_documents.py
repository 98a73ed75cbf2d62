"""Small files of DocVQA, InfoVQA, ChartQA, OCRBench, RealWorldQA and MME, in every layout in which they are published.

`HUB` has the tables of the hub, as the path they lie at and rows, and `OFFICIAL` the writers of the authors' layouts.
"""

from published_files import BLUE, RED, dump, encoded, parquet, save, table, without

DOC_LIST = "val_v1.0_withQT.json"
INFO_LIST = "infovqa_qas/infographicsVQA_val_v1.0_withQT.json"
CHART_FOLDER = "ChartQA Dataset/test"
MME_FOLDER = "MME_Benchmark_release_version"

DOC = [
    {"questionId": "337", "question": "what is the date?", "answers": ["1/8/93", "8 January"],
     "question_types": ["handwritten", "form"], "docId": 279, "image": RED},
    {"questionId": "338", "question": "Who?\n", "answers": ["  Him"], "question_types": ["form"], "docId": 5,
     "image": BLUE},
]  # fmt: skip
INFO = [
    {"questionId": "98", "question": "How many %?", "answers": ["14%"], "answer_type": ["single span"], "image": RED},
    {"questionId": "99", "question": "Whose?", "answers": ["1", "one"], "answer_type": ["multi-span"], "image": RED},
]
CHART = [
    {"type": "human_test", "question": "What is the value?", "answer": "14", "image": RED},
    {"type": "human_test", "question": " Which\tyear? ", "answer": "2010", "image": BLUE},
    {"type": "augmented_test", "question": "Is it?", "answer": "Yes", "image": RED},
]
OCR = [
    {"dataset": "IIIT5K", "question": " what is written? ", "question_type": "Regular Text Recognition",
     "answer": ["centre"], "image": RED},
    {"dataset": "HME100k", "question": "Write the formula.", "answer": ["x^2", "x^ 2"], "image": BLUE,
     "question_type": "Handwritten Mathematical Expression Recognition"},
]  # fmt: skip
REAL = [
    {"question": "Which way?\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option and "
     "nothing else.", "answer": "B", "image": RED},
    {"question": " How many? ", "answer": "3", "image": BLUE},
]  # fmt: skip
MME = [
    {"question_id": f"{name}", "question": f"{text} Please answer yes or no.", "answer": answer, "image": image,
     "category": name.split("/")[0]}
    for name, image in (("artwork/7.jpg", RED), ("count/1.png", BLUE))
    for text, answer in (("Are there two dogs?", "Yes"), ("Is it red? ", "No"))
]  # fmt: skip
HUB = {
    "docvqa": ("DocVQA/validation-00000-of-00001.parquet", DOC),
    "docvqa-test": ("DocVQA/test-00000-of-00001.parquet", [{**row, "answers": None} for row in DOC]),
    "infovqa": ("InfographicVQA/validation-00000-of-00001.parquet", INFO),
    "infovqa-test": ("test-00000-of-00001.parquet", [{**row, "answers": None} for row in INFO]),
    "chartqa": ("data/test-00000-of-00001.parquet", CHART),
    "ocrbench": ("data/test-00000-of-00001.parquet", OCR),
    "realworldqa": ("data/test-00000-of-00001.parquet", REAL),
    "mme": ("data/test-00000-of-00001.parquet", MME),
}


def listed(rows, key, names):
    """Rows as published lists have them: with the name of an image in place of the image."""
    return [{**without(row, "image"), key: names[row["image"]]} for row in rows]


def official_docvqa(folder, split="val", name=DOC_LIST):
    rows = listed(DOC, "image", {RED: "documents/a_1.png", BLUE: "documents/b_2.png"})
    rows = [{**row, "questionId": int(row["questionId"])} for row in rows]
    if split == "test":
        rows = [without(row, "answers") for row in rows]
    dump(folder / name, {"dataset_name": "SP-DocVQA", "data": rows})
    save(folder / "documents/a_1.png", RED)
    save(folder / "documents/b_2.png", BLUE)


def official_infovqa(folder, name=INFO_LIST):
    dump(folder / name, {"data": listed(INFO, "image_local_name", {RED: "38208.jpeg"})})
    save(folder / "infographicsvqa_images/38208.jpeg", RED)


def official_chartqa(folder):
    folder = folder / CHART_FOLDER
    for kind in ("human", "augmented"):
        rows = [
            {"imgname": {RED: "1.png", BLUE: "2.png"}[row["image"]], "query": row["question"], "label": row["answer"]}
            for row in CHART
            if row["type"] == f"{kind}_test"
        ]
        dump(folder / f"test_{kind}.json", rows)
    save(folder / "png/1.png", RED)
    save(folder / "png/2.png", BLUE)


def official_ocrbench(folder):
    names = {"dataset": "dataset_name", "question_type": "type", "answer": "answers", "question": "question"}
    rows = [
        {new: row[old] for old, new in names.items()} | {"image_path": f"IIIT5K/{i}.png"} for i, row in enumerate(OCR)
    ]
    rows[0]["answers"] = "centre"
    dump(folder / "OCRBench/OCRBench.json", rows)
    save(folder / "OCRBench_Images/IIIT5K/0.png", RED)
    save(folder / "OCRBench_Images/IIIT5K/1.png", BLUE)


def official_mme(folder):
    folder = folder / MME_FOLDER
    text = "Are there two dogs? Please answer yes or no.\tYes\r\nIs it red?  Please answer yes or no.\tNo\r\n\r\n"
    save(folder / "artwork/questions_answers_YN/7.txt", text.encode())
    save(folder / "artwork/images/7.jpg", RED)
    save(folder / "count/1.txt", text.encode())
    save(folder / "count/1.png", BLUE)
    save(folder / "eval_tool/count.txt", b"1.png\tAre there two dogs?\tYes\tYes\n")


def table_mme(folder):
    rows = [
        {**row, "index": i, "image": encoded(row["image"]), "image_path": row["question_id"]}
        for i, row in enumerate(MME)
    ]
    table(folder / "MME.tsv", rows, ["index", "image", "image_path", "question", "answer", "category"])


def table_ocrbench(folder):
    rows = [
        {**row, "index": i, "image": encoded(row["image"]), "category": row["question_type"]}
        for i, row in enumerate(OCR)
    ]
    table(folder / "OCRBench.tsv", rows, ["index", "image", "question", "answer", "category"])


OFFICIAL = {
    "docvqa": official_docvqa,
    "docvqa-test": lambda folder: official_docvqa(folder, "test", "test/test_v1.0.json"),
    "infovqa": official_infovqa,
    "chartqa": official_chartqa,
    "ocrbench": official_ocrbench,
    "mme": official_mme,
}


def write_hub(name, folder, **changes):
    """Writes the hub's table of a benchmark, with changed values in all rows."""
    path, rows = HUB[name]
    parquet(folder / path, [{**row, **changes} for row in rows])
