"""Conversations to tokens: templates as plain data, and where the loss stands.

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

Content = Sequence[str | int]  # text, and images as their number in the record
Turn = tuple[str, Content]  # ("system" | "user" | "assistant", content)

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written: `before[role]` content `after[role]`.

    Special tokens are spelled out in these texts, and only here do they count; `{end}` is the tokenizer's own end mark.

    Attributes:
      before: role to the text in front of its content; a generation prompt ends with the assistant's.
      after: role to the text behind it. The assistant's begins with the mark that ends an answer; it is learnt.
      system: content of the system turn put first unless the conversation brings its own; None for none.
      opening: text between the assistant's `before` and its answer; it is learnt.
      after_image: the text after each image.
      user_text: False leaves out all text of the user and the system: only images and answers stay.
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
    # FastVLM's own (Qwen2).
    "qwen_2": dataclasses.replace(CHATML, system="You are a helpful assistant."),
    # LLaVA-1.5's, for Vicuna. The space before an answer belongs to its first token.
    "vicuna_v1": Template(
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        after={"system": " ", "user": " ", "assistant": "</s>"},
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        opening=" ",
    ),
    # Image then text (alignment), as LLaVA's `plain`; there a newline ends the text, here the tokenizer's end mark.
    "plain": Template(
        before=dict.fromkeys(ROLES, ""),
        after={"system": "", "user": "", "assistant": "{end}"},
        after_image="",
        user_text=False,
    ),
    # FastVLM's without its system turn.
    "chatml": CHATML,
}
_MARKS = re.compile(r"(<\|im_start\|>|<\|im_end\|>|</s>|\{end\})")


@dataclasses.dataclass(frozen=True)
class Segment:
    """One tokenized conversation of L tokens.

    Attributes:
      tokens: int32 [L].
      image_index: int32 [L]; `slot * tokens_per_image + j` for slots numbered within the record, -1 for text.
      loss_mask: bool [L]; True on the tokens to learn: each answer, its end mark and the text after that.
    """

    tokens: np.ndarray
    image_index: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Part:
    kind: str  # "text", "special" or "image"
    value: str | int
    learn: bool = False


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    tokens_per_image: int,
    generation_prompt: bool = False,
    slots: Sequence[int] = (),
) -> Segment:
    """Tokenizes a conversation; with `generation_prompt` it ends where the assistant's answer would begin.

    All text between two special tokens or images is tokenized as one run, and the answers are found in its offsets:
    tokenizing the pieces alone gives other ids. A token that holds any character of an answer is learnt. Llama's
    tokenizer puts a space before each run, as LLaVA's code has it.

    Args:
      slots: how many image slots each image of the record takes, one after another; one each by default.

    Raises:
      ValueError: an unknown role, or a special token that the tokenizer lacks.
    """
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    tokens, image_index, learn = [*first], [-1] * len(first), [False] * len(first)
    for kind, group in itertools.groupby(_parts(turns, template, generation_prompt), key=lambda part: part.kind):
        parts = list(group)
        if kind == "text":
            ids, offsets = tokenizer.encode_with_offsets("".join(part.value for part in parts))
            tokens += ids
            image_index += [-1] * len(ids)
            learn += _learnt(parts, offsets)
        elif kind == "special":
            names = [tokenizer.end if part.value == "{end}" else part.value for part in parts]
            tokens += [tokenizer.special_id(name) for name in names]
            image_index += [-1] * len(parts)
            learn += [part.learn for part in parts]
        else:
            for part in parts:
                first = sum(slots[: part.value]) if slots else part.value
                count = tokens_per_image * (slots[part.value] if slots else 1)
                tokens += [tokenizer.image_id] * count
                image_index += range(first * tokens_per_image, first * tokens_per_image + count)
                learn += [False] * count
    return Segment(np.array(tokens, np.int32), np.array(image_index, np.int32), np.array(learn, bool))


def end_mark(template: Template, tokenizer: Tokenizer) -> str:
    """Returns the name of the special token that ends an answer."""
    mark = _MARKS.search(template.after["assistant"])[0]
    return tokenizer.end if mark == "{end}" else mark


def chat_template(template: Template, tokenizer: Tokenizer) -> str:
    """Returns `template` in the jinja text that transformers' `apply_chat_template` reads."""
    before, after = dict(template.before), dict(template.after)
    after["assistant"] = after["assistant"].replace("{end}", tokenizer.end)
    answered = {**before, "assistant": before["assistant"] + template.opening}
    system = "" if template.system is None else before["system"] + template.system + after["system"]
    shown = "{%- if true %}" if template.user_text else "{%- if message['role'] == 'assistant' %}"
    lines = [
        "{{- bos_token }}" * (tokenizer.bos is not None),
        "{%- set before = " + json.dumps(answered) + " %}",
        "{%- set after = " + json.dumps(after) + " %}",
        "{%- if messages[0]['role'] != 'system' %}{{- " + json.dumps(system) + " }}{% endif %}" if system else "",
        "{%- for message in messages %}{{- before[message['role']] }}",
        "{%- if message['content'] is string %}" + shown + "{{- message['content'] }}{% endif %}",
        "{%- else %}{%- for part in message['content'] %}",
        "{%- if part['type'] == 'image' %}{{- " + json.dumps(tokenizer.image + template.after_image) + " }}",
        "{%- else %}" + shown + "{{- part['text'] }}{% endif %}{%- endif %}",
        "{%- endfor %}{%- endif %}",
        "{{- after[message['role']] }}",
        "{%- endfor %}",
    ]
    if before["assistant"]:
        lines += ["{%- if add_generation_prompt %}{{- " + json.dumps(before["assistant"]) + " }}{% endif %}"]
    return "\n".join(line for line in lines if line)


def questions(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Splits a conversation into its single question-answer conversations, each with the images of the first turn.

        user(0, "what shape?") assistant("circle") user("is it red?") assistant("no")
        -> user(0, "what shape?") assistant("circle")   |   user(0, "is it red?") assistant("no")

    Raises:
      ValueError: the turns, a leading system turn aside, are not user and assistant in alternation.
    """
    system, talk = split_system(turns)
    if not talk or [role for role, _ in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise ValueError(f"turns must alternate user, assistant, not {', '.join(role for role, _ in talk) or 'none'}")
    images = tuple(part for part in talk[0][1] if isinstance(part, int))
    first, rest = talk[0], talk[2::2]
    asked = [first] + [("user", images + tuple(content)) for _, content in rest]
    return [(*system, question, answer) for question, answer in zip(asked, talk[1::2], strict=True)]


def drop_oldest(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """Returns a conversation without its oldest question and answer, whose images go to the next question.

    user(0, "what shape?") assistant("circle") user("is it red?") assistant("no")
    -> user(0, "is it red?") assistant("no")                    None if there is but one question
    """
    system, talk = split_system(turns)
    if len(talk) < 4:
        return None
    images = tuple(part for part in talk[0][1] if isinstance(part, int))
    return (*system, (talk[2][0], images + tuple(talk[2][1])), *talk[3:])


def shortened(turns: Sequence[Turn]) -> Iterator[tuple[Turn, ...]]:
    """Yields a conversation without its oldest question, without its two oldest, and so on; the newest stays."""
    while (turns := drop_oldest(turns)) is not None:
        yield turns


def split_system(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """(a leading system turn or nothing, the other turns)."""
    count = 1 if turns and turns[0][0] == "system" else 0
    return tuple(turns[:count]), tuple(turns[count:])


def _parts(turns: Sequence[Turn], template: Template, generation_prompt: bool) -> Iterator[_Part]:
    system, talk = split_system(turns)
    if template.system is not None and not system:
        system = (("system", (template.system,)),)
    for role, content in (*system, *talk):
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}: a turn is one of {', '.join(ROLES)}")
        learn = role == "assistant"
        yield from _marked(template.before[role])
        if learn:
            yield from _marked(template.opening, learn)
        for part in content:
            if isinstance(part, int):
                yield _Part("image", part)
                yield from _marked(template.after_image)
            elif part and (learn or template.user_text):
                yield _Part("text", part, learn)
        yield from _marked(template.after[role], learn)
    if generation_prompt:
        yield from _marked(template.before["assistant"])


def _learnt(parts: Sequence[_Part], offsets: Offsets) -> list[bool]:
    """Whether each token of a run of texts holds a character of an answer."""
    if not any(part.learn for part in parts):
        return [False] * len(offsets)
    owned = [learn for part in parts for learn in [part.learn] * len(part.value)]
    before = [*itertools.accumulate(owned, initial=0)]  # characters of answers in front of each
    before.append(before[-1])
    return [before[end if end > start else start + 1] > before[start] for start, end in offsets]


@functools.lru_cache(maxsize=256)
def _marked(text: str, learn: bool = False) -> tuple[_Part, ...]:
    """The text of a template, its special tokens apart."""
    kinds = ((part, "special" if _MARKS.fullmatch(part) else "text") for part in _MARKS.split(text) if part)
    return tuple(_Part(kind, part, learn) for part, kind in kinds)
