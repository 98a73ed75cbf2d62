"""Answers equal those of `generate` on the whole conversation, whatever of it the cache holds."""

import dataclasses
import hashlib

import numpy as np
import PIL.Image
import pytest
from pictures import encode

from fastvlm_jax.chat import answering as room
from fastvlm_jax.chat.answering import Answering
from fastvlm_jax.chat.question import Picture, Question
from fastvlm_jax.generate import generate
from fastvlm_jax.images.sizes import Size
from fastvlm_jax.text.prompt import read_prompts

MAX_TOKENS = 12


def picture(seed, width=8, height=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = encode(PIL.Image.fromarray(pixels), format="PNG")
    return Picture(hashlib.sha256(data).hexdigest(), data, (width, height))


CAT, DOG, BIRD = map(picture, range(3))


def question(talk, pictures=(), name="c", **options):
    return Question(name, read_prompts([talk])[0], tuple(pictures), **options)


def answer(answering, *args, **options):
    """(text, what is told with the first token, number of images that were encoded)."""
    events = list(answering.answer(question(*args, **options)))
    (first,) = [event["first"] for event in events if "first" in event]
    text = "".join(event.get("text", "") for event in events)
    return text, first, events.count({"doing": "encoder"})


def expected(loaded, talk, pictures=(), **options):
    options = {"max_tokens": MAX_TOKENS, **options}
    return generate(*loaded, [image.data for image in pictures] or None, [talk], **options)[0]


@pytest.fixture(scope="module")
def answering(loaded):
    return Answering(*loaded, max_tokens=MAX_TOKENS)


def test_each_turn_equals_generate_and_computes_only_what_is_new(answering, loaded):
    talk, pictures, texts, length = [], [], [], 0
    for asked, new in (("what color is it?", [CAT]), ("is it red?", []), ("what is it?", [DOG, BIRD])):
        images = range(len(pictures), len(pictures) + len(new))
        talk, pictures = [*talk, ("user", (*images, asked))], [*pictures, *new]
        text, first, encoded = answer(answering, talk, pictures)
        assert text == expected(loaded, talk, pictures)
        assert encoded == len(new) and first["image_tokens"] == 4 * len(pictures)
        kept = answering.kept["c"]  # all but the answer's last token, which no other has read
        assert len(kept.names) == kept.cache.length == first["prompt_tokens"] + MAX_TOKENS - 1
        # All of the turn before is kept, or but for what the tokenizer makes of the answer's text.
        assert first["kept_tokens"] >= length and (first["kept_tokens"] > 0) == bool(texts)
        talk, texts, length = [*talk, ("assistant", (text,))], [*texts, text], first["prompt_tokens"]
    assert len(set(texts)) == 3 and min(map(len, texts)) > 3


def test_a_conversation_may_be_changed_anywhere(answering, loaded):
    talk = [("user", (0, "what color is it?")), ("assistant", ("red",)), ("user", (1, "is it red?"))]
    whole, _, _ = answer(answering, talk, [CAT, DOG], "changed")
    again, first, encoded = answer(answering, talk, [CAT, DOG], "changed")
    assert again == whole and first["kept_tokens"] == first["prompt_tokens"] - 1 and encoded == 0
    for pictures, last, kept_most in (
        ([CAT, DOG], "is it no?", first["prompt_tokens"] - 3),
        ([CAT, BIRD], "is it no?", first["prompt_tokens"] - 10),
        ([BIRD, DOG], "is it no?", 10),
    ):
        changed = [*talk[:2], ("user", (1, last))]
        text, told, _ = answer(answering, changed, pictures, "changed")
        assert text == expected(loaded, changed, pictures)
        assert 3 <= told["kept_tokens"] <= kept_most
    shorter, told, _ = answer(answering, talk[:1], [CAT], "changed")
    assert shorter == expected(loaded, talk[:1], [CAT])
    assert len({whole, text, shorter}) == 3


def test_conversations_keep_their_own_caches(answering, loaded):
    talks = {name: [("user", (0, asked))] for name, asked in (("one", "is it red?"), ("two", "what is it?"))}
    pictures = {"one": [CAT], "two": [DOG]}
    for _ in range(2):
        for name, talk in talks.items():
            text, first, _ = answer(answering, talk, pictures[name], name)
            assert text == expected(loaded, talk, pictures[name])
            assert len(talk) == 1 or first["kept_tokens"] > 15
            talk += [("assistant", (text,)), ("user", ("no",))]


def test_the_cache_grows_with_the_conversation(answering, loaded):
    talk = [("user", ("red " * 150,))]
    text, _, _ = answer(answering, talk, (), "long")
    talk += [("assistant", (text,)), ("user", ("what color is it? " * 80,))]
    text, first, _ = answer(answering, talk, (), "long")
    assert text == expected(loaded, talk) and first["prompt_tokens"] > 512 and first["kept_tokens"] > 150


def test_sampling_and_penalties_equal_generate(loaded):
    options = dict(top_p=0.9, top_k=40, repetition_penalty=1.3)
    own = Answering(*loaded, max_tokens=MAX_TOKENS, **options)
    talk = [("user", (0, "is it red?"))]
    texts = [answer(own, talk, [CAT], temperature=2.5, seed=seed)[0] for seed in (5, 6)]
    assert texts == [expected(loaded, talk, [CAT], temperature=2.5, seed=seed, **options) for seed in (5, 6)]
    talk += [("assistant", (texts[1],)), ("user", ("no",))]
    text, first, _ = answer(own, talk, [CAT], temperature=2.5, seed=7)
    assert text == expected(loaded, talk, [CAT], temperature=2.5, seed=7, **options) and first["kept_tokens"]
    assert len({*texts, text}) == 3


def test_an_answer_that_is_stopped_leaves_a_cache_that_goes_on(answering, loaded):
    talk = [("user", (0, "what is it?"))]
    events = answering.answer(question(talk, [CAT], "stopped"))
    pieces = []
    for event in events:
        pieces += [event["text"]] if "text" in event else []
        if len(pieces) == 3:
            events.close()
    talk += [("assistant", ("".join(pieces),)), ("user", ("no",))]
    text, first, _ = answer(answering, talk, [CAT], "stopped")
    assert text == expected(loaded, talk, [CAT]) and first["kept_tokens"] > 10


def test_tiles_and_common_sizes_are_laid_out_as_generate_does(loaded):
    model, variables, processor = loaded
    wide, tall = picture(5, 20, 9), picture(6, 9, 20)
    talk = [("user", (0, "what color is it?")), ("assistant", ("no",)), ("user", (1, "is it red?"))]
    for settings, kept in (
        ({"grids": ((1, 2), (2, 1))}, True),  # both images have an overview and two tiles
        ({"sizes": (Size(8, 8, 8, 4), Size(8, 8, 16, 8))}, False),  # the second image makes both square
    ):
        own = model, variables, dataclasses.replace(processor, **settings)
        answering = Answering(*own, max_tokens=4)
        for turns, pictures in ((talk[:1], [wide]), (talk, [wide, tall])):
            text, first, encoded = answer(answering, turns, pictures)
            assert text == expected(own, turns, pictures, max_tokens=4), settings
        assert (first["kept_tokens"] > 12, encoded) == (kept, 1 if kept else 2)


def test_a_conversation_without_room_for_an_answer_is_refused_and_others_go_on(loaded):
    own = Answering(*loaded, max_tokens=MAX_TOKENS, max_length=40)
    talk = [("user", ("is it red?",))]
    text, _, _ = answer(own, talk)
    with pytest.raises(ValueError, match="tokens long, more than the 28 that leave room for an answer: begin a new"):
        answer(own, [*talk, ("assistant", (text,)), ("user", ("what " * 50,))])
    assert answer(own, talk)[1]["kept_tokens"] > 10


def test_caches_of_old_conversations_make_room(answering, loaded, monkeypatch):
    monkeypatch.setattr(room, "MAX_KEPT", 2)
    talk = [("user", ("is it red?",))]
    for name in ("a", "b", "a", "c"):
        answer(answering, talk, (), name)
    assert list(answering.kept) == ["a", "c"]
    monkeypatch.setattr(room, "MAX_KEPT_BYTES", 1)
    answer(answering, talk, (), "a")
    assert list(answering.kept) == ["a"]


def test_a_model_that_reads_no_images_refuses_one_and_reads_on(loaded):
    model, variables, processor = loaded
    own = Answering(model, variables, dataclasses.replace(processor, image_size=0), max_tokens=MAX_TOKENS)
    with pytest.raises(ValueError, match="reads text alone: leave the image out"):
        answer(own, [("user", (0, "is it red?"))], [CAT])
    assert answer(own, [("user", ("is it red?",))])[0] == expected(loaded, [("user", ("is it red?",))])


def test_a_model_that_cannot_answer_is_refused(loaded):
    with pytest.raises(ValueError, match="no language model or no tokenizer"):
        Answering(*loaded[:2], None)
    with pytest.raises(ValueError, match="max_tokens=0"):
        Answering(*loaded, max_tokens=0)
