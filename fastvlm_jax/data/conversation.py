"""Conversations to tokens: templates as plain data, and where the loss stands.

turns            ("user", (0, "what color?"))  ("assistant", ("red",))          0 is the record's image 0
template         chatml, tokens_per_image = 2                                   S = <|im_start|>, E = <|im_end|>

text             S  user  \\n  <image> <image>  \\n  what  color  ?  E  \\n  S  assistant  \\n  red  E  \\n
image_index     -1    -1  -1        0       1  -1    -1     -1 -1 -1  -1 -1         -1  -1   -1 -1  -1
loss_mask        .     .   .        .       .   .     .      .  .  .   .  .          .   .    1  1   1
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from fastvlm_jax.data.tokenizer import END, IMAGE, START, Tokenizer

Content = Sequence[str | int]  # text, and images as their number in the record
Turn = tuple[str, Content]  # ("system" | "user" | "assistant", content)

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are written: `before_turn` role `after_role` content `end`(the end mark) `after_end`.

    Attributes:
      system: the system turn put first unless the conversation brings its own; None for none.
      turn_marks: False leaves out START, the role and all text of the user: only images and answers stay.
      after_image: the text after each image.
      after_end: the text after the END that closes each turn.
    """

    system: str | None = None
    turn_marks: bool = True
    after_image: str = "\n"
    after_end: str = "\n"


TEMPLATES = {
    # FastVLM's own (Qwen2).
    "qwen_2": Template(system="You are a helpful assistant."),
    # The same without the system turn.
    "chatml": Template(),
    # Image then text (alignment): the user's words are left out, as LLaVA's `plain` does; here END closes the text.
    "plain": Template(turn_marks=False, after_image="", after_end=""),
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """One tokenized conversation of L tokens.

    Attributes:
      tokens: int32 [L].
      image_index: int32 [L]; `image * tokens_per_image + j` for images numbered as in the record, -1 for text.
      loss_mask: bool [L]; True on the tokens to learn: each answer, its END and the text after END.
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
) -> Segment:
    """Tokenizes a conversation; with `generation_prompt` it ends where the assistant's answer would begin.

    All text between two special tokens is tokenized as one run, and the answers are found in its offsets: tokenizing
    the pieces alone gives other ids. A token that holds any character of an answer is learnt.

    Raises:
      ValueError: an unknown role, or a special token that the tokenizer lacks.
    """
    tokens, image_index, learn = [], [], []
    for kind, group in itertools.groupby(_parts(turns, template, generation_prompt), key=lambda part: part.kind):
        parts = list(group)
        if kind == "text":
            # owner[c]: whether character c of the run belongs to an answer
            owner = np.repeat([part.learn for part in parts], [len(part.value) for part in parts])
            ids, offsets = tokenizer.encode_with_offsets("".join(part.value for part in parts))
            tokens += ids
            image_index += [-1] * len(ids)
            learn += [bool(owner[start : max(end, start + 1)].any()) for start, end in offsets]
        elif kind == "special":
            tokens += [tokenizer.special_id(part.value) for part in parts]
            image_index += [-1] * len(parts)
            learn += [part.learn for part in parts]
        else:
            count = tokens_per_image * len(parts)
            tokens += [tokenizer.special_id(IMAGE)] * count
            image_index += [part.value * tokens_per_image + j for part in parts for j in range(tokens_per_image)]
            learn += [False] * count
    return Segment(np.array(tokens, np.int32), np.array(image_index, np.int32), np.array(learn, bool))


def questions(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Splits a conversation into its single question-answer conversations, each with the images of the first turn.

        user(0, "what shape?") assistant("circle") user("is it red?") assistant("no")
        -> user(0, "what shape?") assistant("circle")   |   user(0, "is it red?") assistant("no")

    Raises:
      ValueError: the turns, a leading system turn aside, are not user and assistant in alternation.
    """
    system, talk = _split_system(turns)
    if not talk or [role for role, _ in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise ValueError(f"turns must alternate user, assistant, not {', '.join(role for role, _ in talk) or 'none'}")
    images = tuple(part for part in talk[0][1] if isinstance(part, int))
    first, rest = talk[0], talk[2::2]
    asked = [first] + [("user", images + tuple(content)) for _, content in rest]
    return [(*system, question, answer) for question, answer in zip(asked, talk[1::2], strict=True)]


def _split_system(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    count = 1 if turns and turns[0][0] == "system" else 0
    return tuple(turns[:count]), tuple(turns[count:])


def _parts(turns: Sequence[Turn], template: Template, generation_prompt: bool) -> Iterator[_Part]:
    system, talk = _split_system(turns)
    if template.system is not None and not system:
        system = (("system", (template.system,)),)
    for role, content in (*system, *talk):
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}: a turn is one of {', '.join(ROLES)}")
        learn = role == "assistant"
        shown = template.turn_marks or learn
        if template.turn_marks:
            yield _Part("special", START)
            yield _Part("text", f"{role}\n")
        for part in content:
            if isinstance(part, int):
                yield _Part("image", part)
                yield from _text(template.after_image)
            elif shown:
                yield from _text(part, learn)
        if shown:
            yield _Part("special", END, learn)
            yield from _text(template.after_end, learn)
    if generation_prompt and template.turn_marks:
        yield _Part("special", START)
        yield _Part("text", "assistant\n")


def _text(text: str, learn: bool = False) -> Iterator[_Part]:
    if text:
        yield _Part("text", text, learn)
