"""Turns rows of named columns into records, by the plan of columns.py.

A row that holds what looks like a picture in a place where none is read is refused: a record of text alone is made only
from a row that has no such thing.
"""

import collections
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from fastvlm_jax.data.readers import Options, pictures
from fastvlm_jax.data.readers.columns import (
    ANY_FILE,
    EXPECTED,
    Plan,
    kind_of,
    pair_keys,
    sound_or_video,
    try_plan,
)
from fastvlm_jax.data.readers.conversations import MARK, about_image, as_list, place, read_messages, shown, text_of
from fastvlm_jax.data.readers.files import ImagesFolder
from fastvlm_jax.data.record import Record
from fastvlm_jax.text.conversation import Turn

_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}\s*")
_MESSAGE = ("from", "value", "role", "content")
_ALL = "*"  # any name may be that of an image which was read


def row_record(key: str, row: Mapping[str, Any], folder: ImagesFolder, options: Options) -> Record:
    """Returns the record of a row that no table's columns describe, such as a JSON object; its id is left to the key.

    Raises:
      ValueError: as `to_record`; or the keys fit no known layout, and the message names them.
    """
    plan = try_plan({name: kind_of(name, value) for name, value in row.items()})
    record = to_record(key, row, plan, folder, options)
    return Record(key, record.images, record.turns, {k: v for k, v in record.extra.items() if k != "id"})


def to_record(key: str, row: Mapping[str, Any], plan: Plan, folder: ImagesFolder, options: Options) -> Record:
    """Returns the record of a row.

    Args:
      key: key of the record.
      row: column -> value.
      plan: what the columns are.
      folder: where the images are that the row names.
      options: questions about captions.

    Raises:
      ValueError: the row cannot become a record; the message is a short line that says why.
    """
    if plan.kind == "row":
        (name,) = plan.texts
        inner = _parsed(name, row[name])
        if not isinstance(inner, dict) or "json" in map(str.lower, inner):
            raise ValueError(f"{name} is {shown(inner)}, not an object with the keys of an entry")
        return row_record(key, {**inner, **{k: v for k, v in row.items() if k != name}}, folder, options)
    _refuse_sound_and_video(row, itself=True)
    images, names = _images(row, plan, folder)
    _check_texts(row, plan)
    extra = {"id": row[plan.id]} if plan.id and isinstance(row.get(plan.id), str | int) else {}
    kind, values = _values(row, plan)
    messages: Any = []
    if kind == "captions":
        turns = _caption_turns(key, values[0], images, plan, options, extra)
    else:
        messages = _messages(kind, plan.texts, values, len(images), extra)
        talk, held = read_messages(messages)
        images = _with_held(images, held, folder)
        names |= {pictures.base_name(name) for value in held for name in pictures.texts_in(value)}
        turns = place(talk, len(images))
    _refuse_unread(row, plan, messages, names, bool(images))
    return Record(key, tuple(images), turns, extra)


def _refuse_sound_and_video(row: Mapping[str, Any], itself: bool) -> None:
    for name, value in row.items():
        what = sound_or_video(name, itself)
        if what and (any(value.values()) if isinstance(value, dict) else value):
            raise ValueError(f"it is about a {what}: only images are read, and {shown(name)} is not empty")


def _images(row: Mapping[str, Any], plan: Plan, folder: ImagesFolder) -> tuple[list[bytes], set[str]]:
    """Returns the images in the columns of a row, and the names by which other columns may tell of the same images."""
    if images := pictures.read(((name, row.get(name)) for name in plan.images), folder):
        return images, {_ALL}
    for name in plan.named:
        value = row.get(name)
        if name.lower() in ANY_FILE and plan.kind != "captions" and _is_other_file(value):
            continue
        if images := pictures.read([(name, value)], folder):
            return images, {pictures.base_name(text) for text in pictures.texts_in(value)}
    return [], set()


def _is_other_file(value: Any) -> bool:
    """Returns whether a value names a file that is no picture, such as "main.py"."""
    return isinstance(value, str) and not any(pictures.found_in(value)) and bool(_suffix(value))


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1]
    return suffix if _SUFFIX.fullmatch(suffix) else ""


def _refuse_unread(row: Mapping[str, Any], plan: Plan, messages: Any, names: set[str], pictured: bool) -> None:
    """Raises ValueError if a place that is not read holds a picture, other than one that was read from another.

    Beside images that were read, an address tells where they came from, and so does the name of a file if it ends as
    theirs does, or if the images are in the row as bytes.
    """
    if not pictured:  # beside images, as of frames, there may be the number of a video
        _refuse_sound_and_video(row, itself=False)
    identity = (plan.id,) if plan.id and not pictured else ()
    places = [(name, row.get(name)) for name in (*plan.named, *plan.others, *identity)]
    for message in messages if isinstance(messages, list) else ():
        places += [(f"{key} of a message", value) for key, value in message.items() if key not in _MESSAGE]
    for name, value in places:
        for found in pictures.found_in(value):
            if pictures.is_encoded(found):
                if pictured and name in plan.named:
                    continue  # the same image once more, in another form
                what = "an encoded picture"
            elif pictured and (pictures.is_address(found) or {_ALL, pictures.base_name(found)} & names):
                continue
            else:
                what = shown(found)
            raise ValueError(
                f"{shown(name)} holds {what}, which is not read: list all images in `images`, or delete it"
            )


def _check_texts(row: Mapping[str, Any], plan: Plan) -> None:
    if not plan.kind:
        raise ValueError(f"the keys are {shown(', '.join(map(str, row))) if row else 'none'}: expected are {EXPECTED}")
    for name in plan.texts[:2]:  # the input of an instruction may be empty
        value = row.get(name)
        if value is None or (isinstance(value, str | list) and not value and (plan.kind, value) != ("messages", [])):
            raise ValueError(f"{name} is {'null' if value is None else 'empty'}")


def _values(row: Mapping[str, Any], plan: Plan) -> tuple[str, list[Any]]:
    """Returns the kind of a row's text and its values; a caption that is JSON of messages or pairs is not a caption."""
    values = [row.get(name) for name in plan.texts]
    if plan.kind == "captions" and isinstance(values[0], str) and values[0].lstrip()[:2] in ("[{", '{"'):
        try:
            value = as_list(json.loads(values[0]))
        except (ValueError, RecursionError):
            return plan.kind, values
        if (kind := kind_of("", value)) in ("messages", "pairs"):
            return kind, [value]
    return plan.kind, values


def _with_held(images: list[bytes], held: list[Any], folder: ImagesFolder) -> list[bytes]:
    """Returns the images of a row in the order of the marks, with those that its messages hold themselves."""
    if not any(value is not None for value in held):
        return images
    own = [pictures.read([("an image of a message", value)], folder) for value in held if value is not None]
    if any(len(one) != 1 for one in own):
        raise ValueError("a part of type image holds none or several images, not one")
    if len(own) == len(held) and images == [image for (image,) in own]:
        return images  # listed once more beside the messages
    if len(images) != len(held) - len(own):
        raise ValueError(
            f"the messages hold {len(own)} images and {len(held) - len(own)} marks for others, of which the entry "
            f"lists {len(images)}"
        )
    inner, listed = iter(own), iter(images)
    return [next(listed) if value is None else next(inner)[0] for value in held]


def _caption_turns(
    key: str, value: Any, images: list[bytes], plan: Plan, options: Options, extra: dict
) -> tuple[Turn, ...]:
    if not images:
        columns = (*plan.images, *plan.named)
        raise ValueError(f"{' and '.join(columns)} {'is' if len(columns) == 1 else 'are'} null or empty")
    captions = [text_of(text, plan.texts[0]) for text in _listed(value)]
    if len(captions) > 1:
        extra["captions"] = captions
    if len(images) > 1:
        raise ValueError(f"{len(images)} images have only a caption, not a conversation")
    return about_image(captions[0], key, options.questions)


def _messages(kind: str, names: tuple[str, ...], values: list[Any], num_images: int, extra: dict) -> Any:
    """Returns the messages that the text columns of a row hold or mean."""
    if kind == "messages":
        parsed = [as_list(_parsed(name, value)) for name, value in zip(names, values, strict=True)]
        if len(parsed) == 2 and all(isinstance(part, list) for part in parsed):
            return parsed[0] + parsed[1]
        return parsed[0]
    if kind == "pairs":
        pairs = _pairs(names[0], as_list(_parsed(names[0], values[0])))
    else:
        pairs = _answered(*values[:2], extra)
        if len(values) > 2 and values[2]:
            if len(pairs) > 1:
                raise ValueError(f"{names[2]} stands beside a list of questions: write it into each of them")
            pairs = [(f"{text_of(pairs[0][0], 'a question')}\n{text_of(values[2], names[2])}", pairs[0][1])]
    return _with_marks(pairs, num_images)


def _parsed(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is text that is not JSON") from error
    return value


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _pairs(name: str, value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, list) or any(not isinstance(pair, dict) for pair in value):
        raise ValueError(f"{name} holds a null" if isinstance(value, list) else f"{name} is no list of pairs")
    keys = [pair_keys(pair) for pair in value]
    if None in keys or not keys:
        raise ValueError(f"{name} holds no pairs of user and assistant, or question and answer")
    return [(pair[user], pair[assistant]) for pair, (user, assistant) in zip(value, keys, strict=True)]


def _answered(questions: Any, answers: Any, extra: dict) -> list[tuple[Any, Any]]:
    """Pairs a question with its most frequent answer, or a list of questions with a list of as many answers."""
    if isinstance(questions, list):
        answers = _listed(answers)
        if len(questions) != len(answers):
            raise ValueError(f"there are {len(questions)} questions and {len(answers)} answers")
        return list(zip(questions, answers, strict=True))
    if isinstance(answers, list):
        answers = [text_of(answer, "an answer") for answer in answers]
        if len(answers) > 1:
            extra["answers"] = answers
        answers = collections.Counter(answers).most_common(1)[0][0]
    return [(questions, answers)]


def _with_marks(pairs: list[tuple[Any, Any]], num_images: int) -> list[dict[str, Any]]:
    """Returns the messages of question-answer pairs; without an image mark, all images open the first question."""
    texts = [
        text_of(text, what) for pair in pairs for text, what in zip(pair, ("a question", "an answer"), strict=True)
    ]
    if not any(MARK in text for text in texts):
        texts[0] = MARK * num_images + texts[0]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
