"""What a person asks, as turns: worked by hand, and the same as training reads from LLaVA's JSON."""

import pytest

from fastvlm_jax.data.readers.conversations import to_turns
from fastvlm_jax.text.prompt import place_images, read_prompts

ANSWER = {"from": "gpt", "value": "red"}
PART = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(content):
    return {"role": "user", "content": content}


def turns_of(prompt, count=0):
    (found,) = read_prompts([prompt])
    return place_images(found, range(count))


@pytest.mark.parametrize(
    "prompt, count, content",
    [
        ("what color?", 0, ("what color?",)),
        (" what color?\n", 0, (" what color?\n",)),
        ("", 1, (0,)),
        ("what color?", 1, (0, "what color?")),
        ("<image>\nwhat color?", 1, (0, "what color?")),
        ("what color? <image>", 1, (0, "what color?")),
        ("<image>", 1, (0,)),
        ("compare", 3, (0, 1, 2, "compare")),
        ("compare <image> and <image>, please", 2, ("compare", 0, "and", 1, ", please")),
        ([user("what color?")], 1, (0, "what color?")),
        ([user([PART, text("what color?")])], 1, (0, "what color?")),
        ([user([text("what color?"), PART])], 1, (0, "what color?")),
        ([user([PART, PART, text("compare")])], 2, (0, 1, "compare")),
        ([{"from": "human", "value": "<image>\nwhat color?"}], 1, (0, "what color?")),
        ([("user", "what color?")], 1, (0, "what color?")),
        ([("user", (0, "what <image> color? "))], 1, (0, "what <image> color? ")),
        ([["user", ["what color?", 0]]], 1, ("what color?", 0)),
        ([("user", ("what color?",))], 1, (0, "what color?")),
        ([("user", (1, "or", 0))], 2, (1, "or", 0)),
    ],
)
def test_one_question(prompt, count, content):
    assert turns_of(prompt, count) == (("user", content),)
    assert place_images(read_prompts([prompt])[0], [7, 5, 3][:count]) == (
        ("user", tuple(part if isinstance(part, str) else [7, 5, 3][part] for part in content)),
    )


@pytest.mark.parametrize(
    "value, count",
    [("what color?", 1), ("<image>\nwhat color?", 1), (" why <image> ", 1), ("<image> or <image>\n?", 2), ("why? ", 0)],
)
def test_a_prompt_is_read_as_training_reads_it(value, count):
    trained = to_turns([{"from": "human", "value": value}, ANSWER], count)
    assert turns_of(value, count) == trained[:1]


def test_a_conversation_with_an_image_in_each_question():
    talk = [
        {"role": "system", "content": "be brief"},
        user([PART, text("what color?")]),
        {"role": "assistant", "content": [text("red")]},
        user("and <image>?"),
    ]
    turns = (("system", ("be brief",)), ("user", (0, "what color?")), ("assistant", ("red",)), ("user", (1, "and ?")))
    assert turns_of(talk, 2) == turns
    as_llava = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<image>\nwhat color?"},
        ANSWER,
        {"from": "human", "value": "and <image>?"},
        ANSWER,
    ]
    assert to_turns(as_llava, 2)[:-1] == turns


def test_one_text_one_conversation_or_a_list_of_either():
    assert [prompt.talk for prompt in read_prompts("a")] == [(("user", "a"),)]
    assert [prompt.talk for prompt in read_prompts([user("a")])] == [(("user", "a"),)]
    assert [prompt.talk for prompt in read_prompts((("user", "a"),))] == [(("user", "a"),)]
    assert [len(prompt.talk) for prompt in read_prompts(["a", [user("b")], "c"])] == [1, 1, 1]
    assert [prompt.talk for prompt in read_prompts(("user", "a"))] == [(("user", "user"),), (("user", "a"),)]
    assert read_prompts([]) == []


def test_images_inside_the_messages_are_handed_on():
    parts = [{"type": "image", "image": b"1"}, {"type": "image", "path": "2"}, {"type": "image", "url": "3"}]
    parts += [{"type": "image_url", "image_url": {"url": "4"}}, {"type": "image_url", "image_url": "5"}]
    (prompt,) = read_prompts([user([*parts, {"type": "text", "text": "why?", "image": None}])])
    assert prompt.images == (b"1", "2", "3", "4", "5")
    assert place_images(prompt, range(5)) == (("user", (0, 1, 2, 3, 4, "why?")),)


@pytest.mark.parametrize(
    "prompts, count, words",
    [
        (None, 0, "prompts must be a text, a list of messages, or a list of them, not None"),
        ({"role": "user"}, 0, "not an object of type dict"),
        (iter(["a"]), 0, "not an object of type list_iterator"),
        (["a", 3], 0, r"prompts\[1\]: it is an object of type int: give a text or a list of messages"),
        (["a", []], 0, r"prompts\[1\]: it is an empty list"),
        (["a", user("b")], 0, r"prompts\[1\]: it is an object of type dict"),
        ([user("a"), "b"], 0, "prompts: a message is an object of type str, not a dict of role and content"),
        ([[user("a"), 3]], 0, "a message is an object of type int"),
        ([("what?", "why?")], 0, r"prompts: the role of a message is 'what\?': choose one of human, user, gpt"),
        ([{"content": "a"}], 0, "the role of a message is None"),
        ([{"role": ["user"], "content": "a"}], 0, "the role of a message is an object of type list"),
        ([{"role": "user"}], 0, "the content of a message is None"),
        ([user(b"a")], 0, "the content of a message is an object of type bytes"),
        ([user([True])], 0, "a part of a message is an object of type bool"),
        ([user(["a", PART])], 0, "a part of a message is an object of type str"),
        ([user([{"type": "video", "video": "a.mp4"}])], 0, "has type 'video' and holds video: give 'text' with text"),
        ([user([{"type": "image", "image": b"1", "detail": "low"}])], 1, "holds image, detail"),
        ([user([{"type": "text"}])], 0, "has type 'text' and holds nothing"),
        ([user([text(3)])], 0, "a text is an object of type int"),
        (["\ud800"], 0, r"prompts\[0\]: a text holds half a surrogate pair"),
        ([[("assistant", "hi"), ("user", "a")]], 0, "must be user, assistant, user .* not assistant, user"),
        ([[("user", "hi"), ("user", "a")]], 0, "not user, user"),
        ([[("user", "hi"), ("assistant", "a")]], 0, "end with the user's question, not user, assistant"),
        ([[("system", "hi")]], 0, "not nothing"),
        ([[("user", "a")] * 5000], 0, "not user, user, user, user, user, user, user, user$"),
        (["<image> a"], 0, r"prompts\[0\]: it has 1 <image> marks for 0 images: give one for each mark"),
        (["<image> a <image>"], 1, "it has 2 <image> marks for 1 images"),
        ([[("user", (1, "a"))]], 1, r"its turns name the images \[1\] and hold 0 <image> marks: number each of its 1"),
        ([[("user", (0, "a"))]], 2, r"name the images \[0\]"),
        ([[("user", (-1, "a"))]], 1, r"name the images \[-1\]"),
        ([[("user", (0, "a")), ("assistant", "b"), ("user", "<image>")]], 1, "hold 1 <image> marks"),
    ],
)
def test_any_other_prompt_is_refused_in_one_line(prompts, count, words):
    with pytest.raises(ValueError, match=words) as caught:
        for prompt in read_prompts(prompts):
            place_images(prompt, range(count))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_template_without_chat_needs_an_image():
    (prompt,) = read_prompts("why?")
    assert place_images(prompt, [0], chat=False) == (("user", (0, "why?")),)
    with pytest.raises(ValueError, match=r"prompts: this model's template reads images, no text"):
        place_images(prompt, [], chat=False)
    (prompt,) = read_prompts([user("a"), {"role": "assistant", "content": "b"}, user("c")])
    with pytest.raises(ValueError, match="give one turn, with an image"):
        place_images(prompt, [0], chat=False)
