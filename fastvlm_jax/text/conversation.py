"""Turns conversations into tokens and loss masks, by templates that are plain data.

turns            ("user", (0, "what color?"))  ("assistant", ("red",))          0 is the record's image 0
template         chatml, tokens_per_image = 2                                   S = <|im_start|>, E = <|im_end|>

text             S  user  \\n  <image> <image>  \\n  what  color  ?  E  \\n  S  assistant  \\n  red  E  \\n
image_index     -1    -1  -1        0       1  -1    -1     -1 -1 -1  -1 -1         -1  -1   -1 -1  -1
loss_mask        .     .   .        .       .   .     .      .  .  .   .  .          .   .    1  1   1
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fastvlm_jax.text.tokenizer import Offsets, Tokenizer

Content = Sequence[str | int]  # texts, and images by their index in the record
Turn = tuple[str, Content]  # ("system" | "user" | "assistant", content)

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Template:
    """Describes how a turn is written: `before[role]`, the content, `after[role]`.

    Special tokens spelled out in a template become special ids, in no other text; `{end}` is the tokenizer's end mark.

    Attributes:
      before: text before the content, by role; a generation prompt ends with the assistant's.
      after: text after the content, by role. The assistant's begins with the mark that ends an answer; supervised.
      system: content of the system turn added to a conversation that has none; None adds no turn.
      opening: text between the assistant's `before` and its answer; supervised.
      after_image: text after each image that is not the last thing in its turn.
      user_text: whether to keep the text of the user and the system, besides images and answers.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    system: str | None = None
    opening: str = ""
    after_image: str = "\n"
    user_text: bool = True


CHATML = Template(
    before={role: f"<|im_start|>{role}\n" for role in ROLES},
    after=dict.fromkeys(ROLES, "<|im_end|>\n"),
)
TEMPLATES = {
    # FastVLM's template (Qwen2).
    "qwen_2": dataclasses.replace(CHATML, system="You are a helpful assistant."),
    # LLaVA-1.5's template for Vicuna. The space before an answer belongs to the answer's first token.
    "vicuna_v1": Template(
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        after={"system": " ", "user": " ", "assistant": "</s>"},
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        opening=" ",
    ),
    # Image, then text (alignment), like LLaVA's `plain`, but ended by the tokenizer's end mark instead of a newline.
    "plain": Template(
        before=dict.fromkeys(ROLES, ""),
        after={"system": "", "user": "", "assistant": "{end}"},
        after_image="",
        user_text=False,
    ),
    # FastVLM's template without its system turn.
    "chatml": CHATML,
}
_MARKS = re.compile(r"(<\|im_start\|>|<\|im_end\|>|</s>|\{end\})")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Holds one tokenized conversation of L tokens.

    Attributes:
      tokens: token ids, int32 [L].
      image_index: `slot * tokens_per_image + j` with slots numbered within the record, -1 for text; int32 [L].
      loss_mask: True on supervised tokens: each answer with its opening, its end mark and the text after it; bool [L].
    """

    tokens: np.ndarray
    image_index: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Part:
    kind: str  # "text", "special" or "image"
    value: str | int
    supervised: bool = False


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    tokens_per_image: int,
    generation_prompt: bool = False,
    slots: Sequence[int] = (),
) -> Segment:
    """Tokenizes a conversation.

    All text between two special tokens or images is tokenized as one run, and its offsets show where the answers are:
    tokenizing the pieces alone gives other ids. A token that holds any character of an answer is supervised. Llama's
    tokenizer puts a space before each run, as in LLaVA's code.

    Args:
      turns: conversation to tokenize.
      tokenizer: tokenizer that has the special tokens of the template.
      template: how turns are written.
      tokens_per_image: number of tokens in an image slot.
      generation_prompt: whether to end where the assistant's answer would begin.
      slots: number of consecutive image slots of each image of the record; one each by default.

    Raises:
      ValueError: a role is unknown, or the tokenizer lacks a special token of the template.
    """
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    tokens, image_index, supervised = [*first], [-1] * len(first), [False] * len(first)
    before = ""  # kind of the parts before these
    for kind, group in itertools.groupby(_parts(turns, template, generation_prompt), key=lambda part: part.kind):
        parts = list(group)
        if kind == "text":
            ids, offsets = tokenizer.encode_with_offsets("".join(part.value for part in parts), before == "special")
            tokens += ids
            image_index += [-1] * len(ids)
            supervised += _supervised(parts, offsets)
        elif kind == "special":
            names = [tokenizer.end if part.value == "{end}" else part.value for part in parts]
            tokens += [tokenizer.special_id(name) for name in names]
            image_index += [-1] * len(parts)
            supervised += [part.supervised for part in parts]
        else:
            for part in parts:
                first = sum(slots[: part.value]) if slots else part.value
                count = tokens_per_image * (slots[part.value] if slots else 1)
                tokens += [tokenizer.image_id] * count
                image_index += range(first * tokens_per_image, first * tokens_per_image + count)
                supervised += [False] * count
        before = kind
    return Segment(np.array(tokens, np.int32), np.array(image_index, np.int32), np.array(supervised, bool))


def end_mark(template: Template, tokenizer: Tokenizer) -> str:
    """Returns the name of the special token that ends an answer."""
    mark = _MARKS.search(template.after["assistant"])[0]
    return tokenizer.end if mark == "{end}" else mark


def chat_template(template: Template, tokenizer: Tokenizer) -> str:
    """Returns `template` as the Jinja text that transformers' `apply_chat_template` reads.

    A tokenizer that puts a space before the first text alone sees all of it as one text: the template writes the spaces
    that `render` gets before the first text and behind images.
    """
    space = " " * tokenizer.prefix_once
    before, after = dict(template.before), dict(template.after)
    after["assistant"] = after["assistant"].replace("{end}", tokenizer.end)
    answered = {**before, "assistant": before["assistant"] + template.opening}
    system = "" if template.system is None else before["system"] + template.system + after["system"]
    shown = "{%- if true %}" if template.user_text else "{%- if message['role'] == 'assistant' %}"
    lines = [
        "{{- bos_token }}" * (tokenizer.bos is not None),
        "{{- ' ' }}" * (tokenizer.bos is not None and tokenizer.prefix_once and bool(before["user"])),
        "{%- set before = " + json.dumps(answered) + " %}",
        "{%- set after = " + json.dumps(after) + " %}",
        "{%- if messages[0]['role'] != 'system' %}{{- " + json.dumps(system) + " }}{% endif %}" if system else "",
        "{%- for message in messages %}{{- before[message['role']] }}",
        "{%- if message['content'] is string %}" + shown + "{{- message['content'] }}{% endif %}",
        "{%- else %}{%- for part in message['content'] %}",
        "{%- if part['type'] == 'image' %}{{- " + json.dumps(tokenizer.image + space) + " }}"
        "{%- if not loop.last %}{{- " + json.dumps(template.after_image) + " }}{% endif %}",
        "{%- else %}" + shown + "{{- part['text'] }}{% endif %}{%- endif %}",
        "{%- endfor %}{%- endif %}",
        "{{- after[message['role']] }}",
        "{%- endfor %}",
    ]
    if before["assistant"]:
        lines += ["{%- if add_generation_prompt %}{{- " + json.dumps(before["assistant"]) + " }}{% endif %}"]
    return "\n".join(line for line in lines if line)


def template_of(text: str, tokenizer: Tokenizer) -> str | None:
    """Returns the name of the template that `chat_template` wrote as `text`; None for any other text."""

    def lines(text: str) -> list[str]:  # but for the line of images, which had a newline behind every image before
        return [line for line in text.split("\n") if "part['type'] == 'image'" not in line]

    return next(
        (name for name, known in TEMPLATES.items() if lines(chat_template(known, tokenizer)) == lines(text)), None
    )


def answered(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Returns the turns of a conversation that are trained on: from the first question to the last answer.

        assistant("hi") user(0, "what shape?") assistant("circle") user("why?")
        -> user(0, "what shape?") assistant("circle")

    A leading turn of the assistant is dropped, as in LLaVA's `preprocess`. A last question without an answer is left
    out; LLaVA gives such a conversation no loss at all. If no question with an answer remains, all turns are returned.

    Raises:
      ValueError: a turn that is left out holds an image.
    """
    system, talk = split_system(turns)
    roles = [role for role, _ in talk]
    first = 1 if roles[:2] == ["assistant", "user"] else 0
    last = len(talk) - (1 if roles[-2:] == ["assistant", "user"] else 0)
    if first >= last - 1:
        return tuple(turns)
    for why, left_out in (("opens the conversation", talk[:first]), ("has no answer", talk[last:])):
        images = [part for _, content in left_out for part in content if isinstance(part, int)]
        if images:
            raise ValueError(f"image {images[0]} (counted from 0) is in a turn that is left out, as it {why}")
    return (*system, *talk[first:last])


def questions(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Splits a conversation into one conversation per question, each with the images of the first turn.

        user(0, "what shape?") assistant("circle") user("is it red?") assistant("no")
        -> user(0, "what shape?") assistant("circle")   |   user(0, "is it red?") assistant("no")

    Raises:
      ValueError: the turns after an optional system turn do not alternate between user and assistant.
    """
    system, talk = split_system(turns)
    if not talk or [role for role, _ in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise ValueError(f"turns must alternate user, assistant, not {', '.join(role for role, _ in talk) or 'none'}")
    images = tuple(part for part in talk[0][1] if isinstance(part, int))
    first, rest = talk[0], talk[2::2]
    asked = [first] + [("user", images + tuple(content)) for _, content in rest]
    return [(*system, question, answer) for question, answer in zip(asked, talk[1::2], strict=True)]


def drop_oldest(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """Returns a conversation without its oldest question and answer; the question's images go to the next question.

    user(0, "what shape?") assistant("circle") user("is it red?") assistant("no")
    -> user(0, "is it red?") assistant("no")                    None if there is only one question
    """
    system, talk = split_system(turns)
    if len(talk) < 4:
        return None
    images = tuple(part for part in talk[0][1] if isinstance(part, int))
    return (*system, (talk[2][0], images + tuple(talk[2][1])), *talk[3:])


def shortened(turns: Sequence[Turn]) -> Iterator[tuple[Turn, ...]]:
    """Yields a conversation without its oldest question, without its two oldest, and so on; keeps the newest one."""
    while (turns := drop_oldest(turns)) is not None:
        yield turns


def split_system(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """Splits turns into (the leading system turn or nothing, the other turns)."""
    count = 1 if turns and turns[0][0] == "system" else 0
    return tuple(turns[:count]), tuple(turns[count:])


def renumbered(turns: Sequence[Turn], numbers: Sequence[int]) -> tuple[Turn, ...]:
    """Returns turns whose images are counted from 0 in the order of `numbers`."""
    return tuple(
        (role, tuple(part if isinstance(part, str) else numbers.index(part) for part in content))
        for role, content in turns
    )


def _parts(turns: Sequence[Turn], template: Template, generation_prompt: bool) -> Iterator[_Part]:
    system, talk = split_system(turns)
    if template.system is not None and not system:
        system = (("system", (template.system,)),)
    for role, content in (*system, *talk):
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}: a turn is one of {', '.join(ROLES)}")
        supervised = role == "assistant"
        yield from _split_marks(template.before[role])
        if supervised:
            yield from _split_marks(template.opening, supervised)
        content = [part for part in content if part != ""]
        for number, part in enumerate(content, 1):
            if isinstance(part, int):
                yield _Part("image", part)
                if number < len(content):  # LLaVA strips the newline behind an image that ends its turn
                    yield from _split_marks(template.after_image)
            elif supervised or template.user_text:
                yield _Part("text", part, supervised)
        yield from _split_marks(template.after[role], supervised)
    if generation_prompt:
        yield from _split_marks(template.before["assistant"])


def _supervised(parts: Sequence[_Part], offsets: Offsets) -> list[bool]:
    """Returns for each token of a run of texts whether it holds a supervised character."""
    if not any(part.supervised for part in parts):
        return [False] * len(offsets)
    characters = [supervised for part in parts for supervised in [part.supervised] * len(part.value)]
    before = [*itertools.accumulate(characters, initial=0)]  # number of supervised characters before each position
    before.append(before[-1])
    return [before[end if end > start else start + 1] > before[start] for start, end in offsets]


@functools.lru_cache(maxsize=256)
def _split_marks(text: str, supervised: bool = False) -> tuple[_Part, ...]:
    """Splits a text of a template into its special tokens and the plain text between them."""
    kinds = ((part, "special" if _MARKS.fullmatch(part) else "text") for part in _MARKS.split(text) if part)
    return tuple(_Part(kind, part, supervised) for part, kind in kinds)
