"""What a model is asked for a row, with hand-written rows; and which rows cannot be asked, with what reason."""

import io

import PIL.Image
import pytest

from fastvlm_jax.evaluate.benchmark import Mark, Picture, Protocol, Row, ask
from fastvlm_jax.evaluate.questions import prepare
from fastvlm_jax.images.sizes import Size
from fastvlm_jax.processor import Processor


def picture(name, width=8, height=8, colour="red"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(file, "PNG")
    return Picture(name, file.getvalue)


def unreadable(name):
    def read():
        raise ValueError(f"{name} is torn")

    return Picture(name, read)


def row(name, *pictures, turns=None):
    """A row that is asked about all of its pictures, or with `turns`."""
    return Row(name, "what is it?", pictures, ("red",), {"turns": turns or ask(*range(len(pictures)), "what is it?")})


OWN = Protocol("own", "1", lambda row: row.fields["turns"], lambda answer, row: Mark(0.0, None), 16, "a rule")


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, "chatml", 16, 4)


def test_a_question_has_the_images_that_its_prompt_names(processor):
    cat, dog = picture("cat"), picture("dog")
    rows = [
        row("both", cat, dog, turns=ask(1, " and ", 0, "?")),
        row("second", cat, dog, turns=ask(1, "what is it?")),
        row("none", cat, turns=ask("what?")),
    ]
    both, second, none = prepare(rows, OWN, processor, most_tokens=99).questions
    assert (both.prompt, both.pictures, both.turns) == ("<image> and <image>?", (cat, dog), ask(1, " and ", 0, "?"))
    assert (second.prompt, second.pictures, second.turns) == ("<image>what is it?", (dog,), ask(0, "what is it?"))
    assert (none.prompt, none.pictures, none.size, none.grids) == ("what?", (), None, ())
    segments = [processor.segment(question.turns, True) for question in (both, second, none)]
    assert [(segment.image_index >= 0).sum() for segment in segments] == [8, 4, 0]  # 4 placeholders an image
    assert [question.length for question in (both, second, none)] == [len(segment.tokens) for segment in segments]


def test_several_turns_are_told_with_their_roles(processor):
    turns = (("system", ("be short",)), ("user", (0, "what?")), ("assistant", ("red",)), ("user", ("sure?",)))
    (question,) = prepare([row("a", picture("cat"), turns=turns)], OWN, processor, most_tokens=99).questions
    assert question.prompt == "system: be short\nuser: <image>what?\nassistant: red\nuser: sure?"


def test_a_typed_mark_stays_text(processor):
    turns = ask(0, "what does <image> mean?")
    (question,) = prepare([row("a", picture("cat"), turns=turns)], OWN, processor, most_tokens=99).questions
    assert question.turns == turns and len(question.pictures) == 1
    assert (processor.segment(question.turns, True).image_index >= 0).sum() == 4


def test_images_of_a_fixed_size_are_not_read_before_they_are_asked_about(processor):
    (question,) = prepare([row("a", unreadable("cat"))], OWN, processor, most_tokens=99).questions
    assert question.size == Size(16, 16, 16, 4)


def test_the_shape_of_the_images_depends_on_the_row_alone(tokenizer):
    wide, tall = picture("wide", 40, 20), picture("tall", 20, 40)
    rows = [row("wide", wide), row("tall", tall), row("two", wide, tall), row("more", wide, wide, tall)]
    buckets = Processor(tokenizer, "chatml", 16, 4, sizes=(Size(16, 16, 16, 4), Size(16, 8, 24, 3), Size(16, 24, 8, 3)))
    questions = prepare(rows, OWN, buckets, most_tokens=99).questions
    # The mean aspect of two to one and one to two is a square; of two wide ones and a tall one, 2 ** (1 / 3).
    assert [(q.size.height, q.size.width) for q in questions] == [(8, 24), (24, 8), (16, 16), (16, 16)]
    tiles = Processor(tokenizer, "chatml", 16, 4, grids=((1, 2), (2, 1), (2, 2)))
    questions = prepare(rows, OWN, tiles, most_tokens=99).questions
    assert [q.grids for q in questions[:3]] == [((1, 2),), ((2, 1),), ((1, 2), (2, 1))]
    assert [q.slots for q in questions[:3]] == [(3,), (3,), (3, 3)]
    wide, both = questions[0], questions[2]
    assert both.length - wide.length in (12, 13)  # one more image of three slots; Llama's tokenizer may add a space


def test_a_row_that_cannot_be_asked_is_named_or_left_out(processor):
    cut = Picture("cut.png", lambda: b"\x89PNG\r\n\x1a\n cut")
    rows = [
        row("fine", picture("cat")),
        row("cut", cut),
        row("cut too", cut),
        row("torn", unreadable("page 7")),
        row("long", turns=ask("what " * 90)),
        row("far", picture("cat"), turns=ask(1, "what?")),
        row("end", turns=(("user", ("a",)), ("assistant", ("b",)))),
    ]
    prepared = prepare(rows, OWN, processor, most_tokens=40, strict=False)
    reasons = dict(prepared.left_out)
    assert [q.row.id for q in prepared.questions] == ["fine"]
    assert list(reasons) == ["cut", "cut too", "torn", "long", "far", "end"]
    assert reasons["cut"].startswith("cut.png: the image cannot be read") and reasons["torn"] == "page 7 is torn"
    assert "tokens long, more than the 40 that leave room to answer" in reasons["long"]
    assert reasons["far"] == "its prompt names image 1 of 1" and "end with the user's question" in reasons["end"]
    assert prepared.describe_left_out().startswith("2 x cut.png: ")
    with pytest.raises(ValueError, match=r"^row long cannot be asked: its prompt is \d+ tokens long, more than the 40"):
        prepare([rows[0], rows[4]], OWN, processor, most_tokens=40)
    tiles = Processor(processor.tokenizer, "chatml", 16, 4, grids=((2, 2),))
    with pytest.raises(ValueError, match=r"^row cut cannot be asked: the image cannot be read"):
        prepare(rows[1:2], OWN, tiles, most_tokens=40)


def test_models_without_an_encoder_or_without_text_are_asked_what_they_can_read(tokenizer):
    rows = [row("seen", picture("cat")), row("text")]
    blind = prepare(rows, OWN, Processor(tokenizer, "chatml", 0, 0), most_tokens=99, strict=False)
    assert [q.row.id for q in blind.questions] == ["text"]
    assert blind.left_out == [("seen", "it has images, which this model does not read")]
    plain = prepare(rows, OWN, Processor(tokenizer, "plain", 16, 4), most_tokens=99, strict=False)
    assert [q.row.id for q in plain.questions] == ["seen"] and plain.left_out[0][0] == "text"
