"""Reads the files of questions that LLaVA publishes for its evaluation scripts: JSON lines, an object a question.

{"question_id": "201307251", "image": "n161313.jpg", "text": "Is it overcast?\\nAnswer the question using ...", ...}
"""

from typing import NamedTuple

from etils import epath

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import published
from fastvlm_jax.evaluate.benchmark import SHORT_ANSWER


class LlavaQuestion(NamedTuple):
    """Holds a question as LLaVA asks it.

    Attributes:
      id: its published id, a text or a number.
      image: name of its image in the folder of images.
      text: what LLaVA asks below the image, without the format sentence at its end.
      category: the part of the benchmark that it belongs to; "" if the file names none.
    """

    id: str | int
    image: str
    text: str
    category: str


def read_llava_questions(path: epath.Path) -> list[LlavaQuestion]:
    """Returns the questions of a file, in its order.

    Raises:
      ValueError: a question lacks a key, or its text does not end in the format sentence of short answers.
    """
    found = []
    for number, row in enumerate(published.read_lines(path)):
        where = f"{path} question {number}"
        text = published.text(row, "text", where)
        if not text.endswith(SHORT_ANSWER):
            raise ValueError(f"{where}: its text ends in {shown(text[-40:])}, not in {shown(SHORT_ANSWER.strip())}")
        found.append(
            LlavaQuestion(
                id=published.get(row, "question_id", where),
                image=published.text(row, "image", where),
                text=text.removesuffix(SHORT_ANSWER),
                category=str(row.get("category", "")),
            )
        )
    return found
