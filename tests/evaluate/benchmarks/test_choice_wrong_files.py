"""ScienceQA, AI2D, SEED-Bench, MMBench, CV-Bench, MMMU and MathVista: wrong or missing files end in a line."""

import pytest
from published_choices import AI2D, HUB, OTHER, official_scienceqa, official_seedbench, table_ai2d, write_hub
from published_files import RED, dump, parquet, read, save, without

from fastvlm_jax.evaluate.benchmarks import BENCHMARKS


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
            read(form, tmp_path / folder)


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
    _, rows = HUB[name]
    write_hub(name, tmp_path, [{**old, **values} if i == row else old for i, old in enumerate(rows)])
    with pytest.raises(ValueError, match=words) as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HUB)
def test_a_missing_column_and_a_wrong_layout_are_one_line(name, tmp_path):
    _, rows = HUB[name]
    column = {"mmmu": "image_4", "mathvista": "decoded_image"}.get(name, "image")
    folder = write_hub(name, tmp_path, [without(row, column) for row in rows])
    with pytest.raises(ValueError, match=f"has no column {column}: it has ") as error:
        read(name, folder)
    assert "\n" not in str(error.value)
    save(tmp_path / "empty/other.txt", b"x")
    with pytest.raises(FileNotFoundError, match=r"holds 'other\.txt': expected are ") as error:
        read(name, tmp_path / "empty")
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
        read(name, tmp_path)
    assert "\n" not in str(error.value)


def test_images_of_seedbench_need_no_frames(tmp_path):
    official_seedbench(tmp_path)
    (tmp_path / "llava-seed-bench.jsonl").unlink()
    assert len(read("seedbench-image", tmp_path)) == 2


def test_a_table_with_a_short_row_is_one_line(tmp_path):
    table_ai2d(tmp_path)
    path = tmp_path / "AI2D_TEST.tsv"
    path.write_bytes(path.read_bytes().rsplit(b"\t", 2)[0])
    with pytest.raises(ValueError, match=r"AI2D_TEST\.tsv row 1 has 7 cells, and the head 9 names$"):
        read("ai2d", tmp_path)


def test_a_missing_problem_does_not_list_all_others(tmp_path):
    official_scienceqa(tmp_path)
    dump(tmp_path / "problems.json", {str(i): {} for i in range(100, 30000)})
    with pytest.raises(ValueError, match="has no 5: it has 100, 101, ") as error:
        read("scienceqa", tmp_path)
    assert len(str(error.value)) < 600


def test_questions_that_are_no_list_are_one_line(tmp_path):
    dump(tmp_path / "SEED-Bench.json", {"questions": {"1": "x"}})
    with pytest.raises(ValueError, match=r"questions is not a list of objects$"):
        read("seedbench-image", tmp_path)
