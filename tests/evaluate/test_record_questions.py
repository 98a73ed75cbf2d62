"""Which questions a model is asked, with hand-written records, and which records are left out with what reason."""

import io

import PIL.Image
import pytest

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.record_questions import collect
from fastvlm_jax.processor import Processor


def picture(colour, size=(8, 8)):
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue")
TWO_TURNS = (
    ("user", (0, "what colour?")), ("assistant", ("red",)), ("user", ("is it blue?",)), ("assistant", ("no\n",))
)  # fmt: skip


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, "chatml", 16, 4)


def test_each_question_alone_has_the_images_of_the_first_turn(processor):
    asked = collect([Record("a", (RED,), TWO_TURNS)], processor).questions
    assert [(q.key, q.images, q.turns, q.truth, q.text) for q in asked] == [
        ("a", (RED,), (("user", (0, "what colour?")),), "red", "what colour?"),
        ("a", (RED,), (("user", (0, "is it blue?")),), "no\n", "is it blue?"),
    ]


def test_a_conversation_is_asked_with_its_earlier_turns_and_their_reference_answers(processor):
    asked = collect([Record("a", (RED,), TWO_TURNS)], processor, turns="conversation").questions
    assert [q.turns for q in asked] == [TWO_TURNS[:1], TWO_TURNS[:3]]
    # <|im_start|> role newline ... : 4 placeholders for the image, which both prompts hold once
    for question in asked:
        segment = processor.segment(question.turns, True)
        assert question.length == len(segment.tokens) and (segment.image_index >= 0).sum() == 4


def test_a_later_turn_may_bring_an_image_and_each_prompt_has_only_those_that_it_names(processor):
    talk = (("user", ("hello",)), ("assistant", ("hi",)), ("user", (1, "and", 0)), ("assistant", ("two",)))
    first, second = collect([Record("a", (RED, BLUE), talk)], processor, turns="conversation").questions
    assert first.images == () and first.turns == (("user", ("hello",)),)
    assert second.images == (RED, BLUE) and second.turns[-1] == ("user", (1, "and", 0))
    only = (("user", (1, "which?")), ("assistant", ("blue",)))
    (question,) = collect([Record("b", (RED, BLUE), only)], processor).questions
    assert question.images == (BLUE,) and question.turns == (("user", (0, "which?")),)


def test_typed_marks_stay_text(processor):
    talk = (("user", (0, "what does <image> mean?")), ("assistant", ("a mark",)))
    (question,) = collect([Record("a", (RED,), talk)], processor).questions
    assert question.text == "what does <image> mean?" and question.images == (RED,)


def test_the_limit_counts_questions(processor):
    records = [Record(str(i), (RED,), TWO_TURNS) for i in range(5)]
    assert [q.key for q in collect(records, processor, limit=3).questions] == ["0", "0", "1"]


def test_records_that_cannot_be_asked_about_are_left_out_with_the_reason(processor, tmp_path):
    alone = (("user", ("hello",)), ("assistant", ("hi",)))
    write_shards(
        tmp_path,
        "validation",
        [
            Record("good", (RED,), TWO_TURNS),
            Record("cut", (RED[:40],), TWO_TURNS),
            Record("order", (RED,), (TWO_TURNS[1], TWO_TURNS[0])),
            Record("long", (RED,), (("user", (0, "what " * 9000)), TWO_TURNS[1])),
            Record("text", (), alone),
        ],
    )
    asked = collect(read_shards(tmp_path, "validation"), processor)
    assert [q.key for q in asked.questions] == ["good", "good", "text"]
    assert [key for key, _ in asked.left_out] == ["cut", "order", "long"]
    reasons = dict(asked.left_out)
    assert "must alternate user, assistant" in reasons["order"] and "tokens long, more than the 8176" in reasons["long"]
    assert asked.describe_left_out().count("1 x ") == 3


def test_a_model_without_encoder_is_asked_about_text_alone(tokenizer):
    records = [Record("seen", (RED,), TWO_TURNS), Record("text", (), (("user", ("hi",)), ("assistant", ("hello",))))]
    asked = collect(records, Processor(tokenizer, "chatml", 0, 0))
    assert [q.key for q in asked.questions] == ["text"] and asked.left_out[0][0] == "seen"


def test_a_template_that_reads_no_text_is_asked_about_images_alone(tokenizer):
    records = [
        Record("text", (), (("user", ("hi",)), ("assistant", ("hello",)))),
        Record("seen", (RED,), TWO_TURNS[:2]),
    ]
    asked = collect(records, Processor(tokenizer, "plain", 16, 4))
    assert [q.key for q in asked.questions] == ["seen"] and asked.left_out[0][0] == "text"
