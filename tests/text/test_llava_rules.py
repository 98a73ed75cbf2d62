"""1,000 random conversations in each template against LLaVA's rules, written here anew.

LLaVA puts the one image of a turn first, drops a leading turn of the assistant, asserts that the turns alternate, cuts
the text at `<image>`, tokenizes each piece, and counts tokens to find what is learnt. docs/data.md has the deviations.
"""

import collections
import random

import pytest
import sentencepiece
import transformers

from fastvlm_jax.data.readers.conversations import to_turns
from fastvlm_jax.data.record import Record, check
from fastvlm_jax.text.conversation import TEMPLATES, render
from fastvlm_jax.text.tokenizer import load_tokenizer

IMAGE, TOKENS_PER_IMAGE = -200, 2
LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEXTS = [
    "what color is it?", "is it red?", "no", "red", "a blue  circle", "日本?", "é😀", "one\ntwo", "x" * 40, "12.5%",
    "no ", "no\n", " two spaces  ", "tab\there", "▁", "A: B, c;", "{end}", "user", "</p>",
]  # fmt: skip


def llava_talk(messages):
    """The turns of LLaVA's `preprocess_multimodal` and `preprocess`; None where these raise."""
    if any(message["from"] == "system" for message in messages):
        return None
    talk = []
    for message in messages:
        value = message["value"]
        if "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        talk.append(("user" if message["from"] == "human" else "assistant", value))
    if talk[0][0] != "user":
        talk = talk[1:]
    return talk if all(role == ("user", "assistant")[i % 2] for i, (role, _) in enumerate(talk)) else None


def with_images(text, tokenize, start=()):
    """LLaVA's `tokenizer_image_token`, with an image already as long as its features."""
    first, *others = text.split("<image>")
    ids = [*start, *tokenize(first)]
    for piece in others:
        ids += [IMAGE] * TOKENS_PER_IMAGE + tokenize(piece)
    return ids


def qwen_reference(json_file):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(json_file))

    def ids_and_labels(talk):
        text, spans = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", []
        for role, value in talk:
            text += f"<|im_start|>{role}\n"
            begin = text
            text += f"{value}<|im_end|>\n"
            spans += [(begin, text)] * (role == "assistant")
        count = lambda text: len(with_images(text, encode))  # noqa: E731
        ids = with_images(text, encode)
        learnt = {i for begin, end in spans for i in range(count(begin), count(end))}
        if talk[-1][0] == "user":  # its count of tokens does not come out: the whole sample is masked
            learnt = set()
        return ids, [i in learnt and ids[i] != IMAGE for i in range(len(ids))]

    def encode(text):
        return theirs.encode(text, add_special_tokens=False)

    return ids_and_labels


def vicuna_reference(llama_file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))

    def encode(text):
        """Llama's legacy tokenizer: the text around </s> is encoded piece by piece, each with a space in front."""
        first, *others = text.split("</s>")
        return model.encode(first) + [i for piece in others for i in [2, *model.encode(piece)]]

    def ids_and_labels(talk):
        text = LLAVA_SYSTEM + " "
        for role, value in talk:
            text += f"USER: {value} " if role == "user" else f"ASSISTANT: {value}</s>"
        ids = with_images(text, encode, [1])
        learnt, at = [False] * len(ids), 1
        for part in text.split("</s>"):
            pieces = part.split(" ASSISTANT: ")
            if len(pieces) != 2:
                break
            asked = len(with_images(pieces[0] + " ASSISTANT: ", encode, [1])) - 2
            length = len(with_images(part, encode, [1]))
            learnt[at + asked : at + length] = [True] * (length - asked)
            at += length
        if at != len(ids):  # "tokenization mismatch"
            learnt = [False] * len(ids)
        return ids, [yes and i != IMAGE for yes, i in zip(learnt, ids, strict=True)]

    return ids_and_labels


def plain_reference(json_file):
    """LLaVA's `preprocess_plain` with the tokenizer's end mark in place of the newline behind a caption."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(json_file))

    def ids_and_labels(talk):
        caption = [*theirs.encode(talk[1][1], add_special_tokens=False), theirs.convert_tokens_to_ids("<|im_end|>")]
        return [IMAGE] * TOKENS_PER_IMAGE + caption, [False] * TOKENS_PER_IMAGE + [True] * len(caption)

    return ids_and_labels


def random_conversation(rng):
    """LLaVA's JSON, and the number of images: mostly in order, sometimes not."""
    count = rng.choice((2, 2, 2, 2, 3, 4, 4, 4, 6, 6))
    speakers = [("human", "gpt")[(i + (rng.random() < 0.15)) % 2] for i in range(count)]
    if rng.random() < 0.8:
        speakers = [("human", "gpt")[i % 2] for i in range(count)]
    if rng.random() < 0.12:
        speakers.insert(0, "gpt")
    if rng.random() < 0.04:
        speakers.insert(0, "system")
    messages = [
        {"from": speaker, "value": " ".join(rng.choices(TEXTS, k=rng.choice((1, 1, 2))))} for speaker in speakers
    ]
    for message in messages:
        if rng.random() < 0.02:
            message["value"] = rng.choice(("", "  ", "\nred", " red", "<|im_end|>", "</s>", "a ASSISTANT: b"))
    images = rng.choice((0, 1, 1, 1, 2))
    asked = [message for message in messages if message["from"] == "human"] or messages
    for number in range(images if rng.random() < 0.95 else 0):
        message = asked[0] if number == 0 and rng.random() < 0.9 else rng.choice((*asked, *asked, *messages))
        text, form = message["value"], rng.choice(("before", "after", "middle", "alone", "tight"))
        message["value"] = {
            "before": f"<image>\n{text}",
            "after": f"{text}\n<image>",
            "middle": f"look <image> {text}",
            "alone": "<image>",
            "tight": f"<image>{text}",
        }[form]
    return messages, images


def deviation(messages, images, refusal):
    """Names the documented reason why a conversation may differ from LLaVA's; "" if it must not.

    It looks at the conversation alone. `refusal` says that this package refuses a conversation.
    """
    marks = [message["value"].count("<image>") for message in messages]
    speakers = [message["from"] for message in messages]
    talk = [message for message in messages if message["from"] != "system"]
    kept = talk[1:] if talk and talk[0]["from"] == "gpt" else talk
    answers = [message["value"] for message in kept if message["from"] == "gpt"]
    if refusal:
        if sum(marks) != images and not (images == 1 and not sum(marks)):
            return "marks and images differ"
        if any(not answer.replace("<image>", "").strip() for answer in answers):
            return "an empty answer"
        if not answers or not kept or kept[0]["from"] != "human":
            return "no question with an answer"
        left_out = talk[: len(talk) - len(kept)] + [kept[-1]] * (kept[-1]["from"] == "human")
        if any("<image>" in message["value"] for message in left_out):
            return "an image in a turn that is left out"
        return ""
    if "system" in speakers:
        return "a system turn"
    if any(mark in message["value"] for message in messages for mark in ("<|im_", "</s>", "ASSISTANT: ")):
        return "marks of the template in a text"
    if max(marks) > 1:
        return "several images in a turn"
    if images and not sum(marks):
        return "an image without a mark"
    if any(answer[:1].isspace() for answer in answers):
        return "white space before an answer"
    if any("<image>" in answer for answer in answers):
        return "an image in an answer"
    if speakers[-1] == "human":
        return "a last question without an answer"
    return ""


def ours(messages, images, tokenizer, template):
    """Ids with -200 for images and what is learnt, or the reason of the refusal."""
    try:
        turns = to_turns(messages, images)
    except ValueError as error:
        return str(error)
    if reason := check(Record("key", (b"",) * images, turns)):
        return reason
    segment = render(turns, tokenizer, TEMPLATES[template], TOKENS_PER_IMAGE)
    ids = [IMAGE if at >= 0 else int(i) for i, at in zip(segment.tokens, segment.image_index, strict=True)]
    return ids, segment.loss_mask.tolist()


REFERENCES = {"qwen_2": ("json_file", qwen_reference), "vicuna_v1": ("llama_file", vicuna_reference)}
DOCUMENTED = {
    "marks and images differ", "an empty answer", "no question with an answer", "an image in a turn that is left out",
    "a system turn", "marks of the template in a text", "several images in a turn", "an image without a mark",
    "white space before an answer", "an image in an answer", "a last question without an answer",
}  # fmt: skip


@pytest.mark.parametrize("template", REFERENCES)
def test_ids_and_labels_are_llavas_or_on_the_documented_list(request, template):
    kind, make = REFERENCES[template]
    file = request.getfixturevalue(kind)
    tokenizer, reference, rng = load_tokenizer(file), make(file), random.Random(13)
    seen = collections.Counter()
    for _ in range(1000):
        messages, images = random_conversation(rng)
        found, talk = ours(messages, images, tokenizer, template), llava_talk(messages)
        why = deviation(messages, images, isinstance(found, str))
        seen[why or ("refused by both" if talk is None else "equal")] += 1
        if why == "a last question without an answer":  # the same without that question
            assert found == reference(llava_talk(messages[:-1])), messages
        elif why == "an image without a mark":  # the same with the mark in front
            first = next(message for message in messages if message["from"] == "human")
            first["value"] = "<image>" + first["value"]
            messages = messages[: len(messages) - (messages[-1]["from"] == "human")]
            if not deviation(messages, images, False):
                assert found == reference(llava_talk(messages)), messages
        elif why in ("white space before an answer", "an image in an answer") and messages[-1]["from"] == "gpt":
            assert found[0] == reference(talk)[0], messages
        elif not why and talk is None:
            assert "alternate" in found or "join them" in found or "starts with" in found, (messages, found)
        elif not why:
            assert found == reference(talk), messages
    assert seen["equal"] > 500 and seen["refused by both"] > 20 and set(seen) >= DOCUMENTED, seen


def test_captions_are_llavas_but_for_the_mark_at_their_end(json_file):
    tokenizer, reference, rng = load_tokenizer(json_file), plain_reference(json_file), random.Random(5)
    for _ in range(200):
        caption = " ".join(rng.choices(TEXTS, k=3))
        messages = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        assert ours(messages, 1, tokenizer, "plain") == reference(llava_talk(messages))


QUESTION, ANSWER = {"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "no"}
IMAGE_QUESTION = {"from": "human", "value": "<image>\nwhat color?"}


def test_a_greeting_and_an_open_question_are_left_out():
    answered = (("user", ("is it red?",)), ("assistant", ("no",)))
    assert to_turns([ANSWER, QUESTION, ANSWER, QUESTION], 0) == answered
    system = {"from": "system", "value": "be brief"}
    assert to_turns([system, ANSWER, QUESTION, ANSWER], 0) == (("system", ("be brief",)), *answered)


@pytest.mark.parametrize(
    "messages, images, words",
    [
        ([QUESTION, ANSWER, IMAGE_QUESTION], 1, r"image 0 \(counted from 0\) is in a turn .* left out, .*no answer"),
        ([{"from": "gpt", "value": "<image> hi"}, QUESTION, ANSWER], 1, "left out, as it opens the conversation"),
    ],
)
def test_an_image_is_not_lost_with_a_turn(messages, images, words):
    with pytest.raises(ValueError, match=words):
        to_turns(messages, images)


@pytest.mark.parametrize(
    "speakers, reason",
    [
        ("user user assistant", "turns 1 and 2 are both of the user: join them, or leave one out"),
        ("user assistant assistant", "turns 2 and 3 are both of the assistant: join them, or leave one out"),
        ("user assistant user user", "turns 3 and 4 are both of the user: join them, or leave one out"),
        ("user assistant user", "the last question has no answer"),
        ("assistant user", "the conversation starts with 'assistant', not with the user"),
    ],
)
def test_turns_of_one_role_in_a_row_are_refused_by_number(speakers, reason):
    assert check(Record("key", (), tuple((role, ("no",)) for role in speakers.split()))) == reason


@pytest.mark.parametrize(
    "content, pieces",
    [
        ((0,), "user \\n <image> <|im_end|>"),
        ((0, 1), "user \\n <image> \\n <image> <|im_end|>"),
        ((0, ""), "user \\n <image> <|im_end|>"),
        (("no", 0), "user \\n no <image> <|im_end|>"),
        ((0, "no"), "user \\n <image> \\n no <|im_end|>"),
    ],
)
def test_an_image_that_ends_its_turn_has_no_newline_behind_it(sentencepiece_file, content, pieces):
    tokenizer = load_tokenizer(sentencepiece_file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ids = render([("user", content)], tokenizer, TEMPLATES["chatml"], 1).tokens.tolist()
    assert " ".join(model.id_to_piece(ids[1:-1])).replace("<0x0A>", "\\n") == pieces
