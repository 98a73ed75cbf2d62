"""Which rows records become, with hand-written records, and which records cannot be asked about for what reason."""

import io

import PIL.Image
import pytest

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.records import own_prompt, rows_of


def picture(colour, size=(8, 8)):
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue")
TWO_TURNS = (
    ("user", (0, "what colour?")), ("assistant", ("red",)), ("user", ("is it blue?",)), ("assistant", ("no\n",))
)  # fmt: skip


def seen(row):
    return row.id, [picture.read() for picture in row.pictures], own_prompt(row), row.references, row.question


def test_each_question_alone_has_the_images_of_the_first_turn():
    assert list(map(seen, rows_of([Record("a", (RED,), TWO_TURNS)], "separate"))) == [
        ("a/0", [RED], (("user", (0, "what colour?")),), ("red",), "what colour?"),
        ("a/1", [RED], (("user", (0, "is it blue?")),), ("no\n",), "is it blue?"),
    ]


def test_a_conversation_is_asked_with_its_earlier_turns_and_their_reference_answers():
    first, second = rows_of([Record("a", (RED,), TWO_TURNS)])
    assert (own_prompt(first), own_prompt(second)) == (TWO_TURNS[:1], TWO_TURNS[:3])
    system = (("system", ("be short",)), *TWO_TURNS)
    assert own_prompt(rows_of([Record("a", (RED,), system)])[1]) == system[:4]


def test_a_later_turn_may_bring_an_image_and_each_row_has_only_those_that_it_names():
    talk = (("user", ("hello",)), ("assistant", ("hi",)), ("user", (1, "and", 0)), ("assistant", ("two",)))
    first, second = rows_of([Record("a", (RED, BLUE), talk)])
    assert first.pictures == () and own_prompt(first) == (("user", ("hello",)),)
    assert seen(second)[1] == [RED, BLUE] and own_prompt(second)[-1] == ("user", (1, "and", 0))
    assert seen(rows_of([Record("b", (RED, BLUE), (("user", (1, "which?")), ("assistant", ("blue",))))])[0]) == (
        "b", [BLUE], (("user", (0, "which?")),), ("blue",), "which?",
    )  # fmt: skip


def test_typed_marks_stay_text():
    (row,) = rows_of([Record("a", (RED,), (("user", (0, "what does <image> mean?")), ("assistant", ("a mark",))))])
    assert row.question == "what does <image> mean?" and len(row.pictures) == 1


def test_ids_differ_where_keys_repeat():
    records = [Record(key, (RED,), TWO_TURNS[:turns]) for key, turns in (("a", 4), ("a/0", 2), ("a", 4), ("b", 2))]
    assert [row.id for row in rows_of(records)] == [
        "a/0", "a/1", "a/0 (record 1)", "a/0 (record 2)", "a/1 (record 2)", "b",
    ]  # fmt: skip


def test_a_limit_counts_the_questions_that_can_be_asked_and_reads_no_further_record():
    read = []

    class Records(list):
        def __getitem__(self, number):
            read.append(number)
            return super().__getitem__(number)

    order = Record("order", (RED,), (TWO_TURNS[1], TWO_TURNS[0]))
    records = Records([order, Record("a", (RED,), TWO_TURNS), Record("b", (RED,), TWO_TURNS), order])
    assert [row.id for row in rows_of(records, limit=3)] == ["order", "a/0", "a/1", "b/0"]
    assert read == [0, 1, 2]
    assert [row.id for row in rows_of(records, limit=9)] == ["order", "a/0", "a/1", "b/0", "b/1", "order (record 3)"]


def test_records_that_cannot_be_asked_about_say_why_and_images_are_read_when_they_are_needed(tmp_path):
    records = [
        Record("good", (RED,), TWO_TURNS),
        Record("order", (RED,), (TWO_TURNS[1], TWO_TURNS[0])),
        Record("cut", (RED[:40],), TWO_TURNS[:2]),
    ]
    write_shards(tmp_path, "validation", records)
    source = read_shards(tmp_path, "validation")
    rows = rows_of(source)
    assert [row.id for row in rows] == ["good/0", "good/1", "order", "cut"]
    with pytest.raises(ValueError, match=r"^turns must alternate user, assistant, not assistant, user$"):
        own_prompt(rows[2])
    assert [[picture.read() for picture in row.pictures] for row in rows] == [[RED], [RED], [], [RED[:40]]]

    shard = next(iter(source.shards))
    data = shard.read_bytes()
    at = data.index(b"turns", data.index(b"order"))
    shard.write_bytes(data[:at] + b"turnt" + data[at + 5 :])
    damaged = [row for row in rows_of(read_shards(tmp_path, "validation")) if row.id == "record 1"]
    with pytest.raises(ValueError, match=r"validation-00000-of-00001.array_record record 1 is damaged"):
        own_prompt(damaged[0])
    with pytest.raises(ValueError, match="unknown turns 'all': choose conversation or separate"):
        rows_of([], "all")
