"""Talks with a model on a terminal."""

import pathlib
from typing import IO

from fastvlm_jax.chat.answering import Answering
from fastvlm_jax.chat.question import Picture, Question
from fastvlm_jax.chat.uploads import check_image
from fastvlm_jax.files import read_small
from fastvlm_jax.images.header import MAX_BYTES
from fastvlm_jax.text.prompt import read_prompts

HELP = "/image FILE shows the model an image, /new begins a new conversation, /quit or Ctrl-D ends."


def talk(answering: Answering, temperature: float, seed: int, source: IO[str], shown: IO[str], told: IO[str]) -> None:
    """Answers the lines of `source`, one after the other, until it ends or a line says so.

    Args:
      answering: answers.
      temperature, seed: see `generate.generate`.
      source: questions and commands, see HELP.
      shown: gets the answers.
      told: gets all else: the prompt for input, the times to the first token, errors.
    """
    told.write(f"{HELP}\n")
    turns, pictures, new = [], [], 0
    while True:
        told.write("> ")
        told.flush()
        line = source.readline()
        if not line or line.strip() in ("/quit", "/exit"):
            told.write("\n" if not line else "")
            return
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/new":
                turns, pictures, new = [], [], 0
                answering.forget()
            elif command == "/image":
                pictures.append(_read(rest.strip()))
                new += 1
                told.write(f"image {len(pictures)}: {pictures[-1].size[0]} x {pictures[-1].size[1]} pixels\n")
            elif command.startswith("/"):
                told.write(f"{HELP}\n")
            elif command:
                images = range(len(pictures) - new, len(pictures))
                asked = [*turns, ("user", (*images, line.strip()))]
                question = Question("terminal", read_prompts([asked])[0], tuple(pictures), temperature, seed)
                turns, new = [*asked, ("assistant", (_answered(answering, question, shown, told),))], 0
        except (ValueError, OSError) as error:
            told.write(f"{' '.join(str(error).split())}\n")


def _read(path: str) -> Picture:
    file = pathlib.Path(path.strip("'\"")).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no image {path or 'without a name: /image FILE'}")
    return check_image(read_small(file, MAX_BYTES), MAX_BYTES)


def _answered(answering: Answering, question: Question, shown: IO[str], told: IO[str]) -> str:
    """Writes an answer as it comes, then its times; returns it."""
    pieces, first = [], {}
    for event in answering.answer(question):
        if "first" in event:
            first = event["first"]
        if "text" in event:
            pieces.append(event["text"])
            shown.write(event["text"])
            shown.flush()
    shown.write("\n")
    shown.flush()
    told.write(f"[{times(first)}]\n")
    return "".join(pieces)


def times(first: dict) -> str:
    """Returns the time to the first token in words, as "first token after 0.21 s: encoder 0.12, prefill 0.09"."""
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in first["seconds"].items() if seconds >= 0.0005)
    kept = f"; {first['kept_tokens']} of {first['prompt_tokens']} tokens were kept" if first["kept_tokens"] else ""
    return f"first token after {sum(first['seconds'].values()):.3f} s: {parts}{kept}"
