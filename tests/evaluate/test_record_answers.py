"""Answers in batches: the shapes, the order, and the same answers as when each question is asked alone."""

import io

import jax
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn
from small import small_config

from fastvlm_jax.data.record import Record
from fastvlm_jax.evaluate import record_answers as answers
from fastvlm_jax.evaluate.record_answers import Result, accuracy, answer, answer_records, batched, fit, standard_error
from fastvlm_jax.evaluate.record_questions import Question, collect
from fastvlm_jax.generate import generate
from fastvlm_jax.models import fastvlm
from fastvlm_jax.processor import Processor


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(i) for i in range(4)]
RECORDS = [
    Record("one", PICTURES[:1], (("user", (0, "what is it?")), ("assistant", ("red",)))),
    Record("text", (), (("user", ("what is red?",)), ("assistant", ("blue",)))),
    Record("two", PICTURES[1:3], (("user", (0, "one", 1, "two?")), ("assistant", ("three",)),
                                  ("user", ("green?",)), ("assistant", ("no",)))),
    Record("same", PICTURES[:1], (("user", (0, "is it green?")), ("assistant", ("green",)))),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tokenizer):
    config = small_config("none")
    config.model.llm.vocab_size = tokenizer.vocab_size
    model = fastvlm.build(**config.model.to_dict())
    variables = jax.jit(lambda: nn.unbox(fastvlm.init_variables(model, jax.random.key(3))))()
    # Larger weights, or every answer would be the same.
    layers = variables["params"]["llm"]["layers"]
    for name, factor in (("q", 5), ("k", 5), ("v", 20), ("o", 20)):
        layers[name]["kernel"] *= factor
    return model, variables, Processor(tokenizer, "chatml", 16, 4)


def question(key, *images):
    return Question(key, images, (("user", ("?",)),), "", 8)


def test_a_batch_ends_at_its_rows_or_at_its_images():
    asked = [question(key, key.encode()) for key in "aabbbc"] + [question("d", b"d", b"e", b"f")]
    assert ["".join(q.key for q in batch) for batch in batched(asked, 4, 9)] == ["aabb", "bcd"]
    assert ["".join(q.key for q in batch) for batch in batched(asked, 9, 2)] == ["aabbb", "c", "d"]
    assert ["".join(q.key for q in batch) for batch in batched(asked, 9, 1)] == ["aa", "bbb", "c", "d"]


def test_a_batch_is_padded_to_the_next_size():
    assert [fit(count, (8, 24, 192)) for count in (0, 1, 8, 9, 24, 25, 192, 200)] == [0, 8, 8, 24, 24, 192, 192, 200]


def test_answers_are_those_of_each_question_alone(tiny, monkeypatch):
    """In batches of one row and image up, against one call of `generate` a question."""
    model, variables, processor = tiny
    asked = collect(RECORDS, processor, turns="conversation").questions
    length = -(-max(q.length for q in asked) // 8) * 8
    alone = [
        generate(*tiny, list(q.images), [q.turns], [list(range(len(q.images)))], max_tokens=5, length=length)[0]
        for q in asked
    ]
    results = answer(model, variables, processor, asked, max_tokens=5)
    assert [(r.key, r.question, r.truth) for r in results] == [
        ("one", "what is it?", "red"), ("text", "what is red?", "blue"), ("two", "onetwo?", "three"),
        ("two", "green?", "no"), ("same", "is it green?", "green"),
    ]  # fmt: skip
    assert [r.answer for r in results] == alone and len(set(alone)) > 2

    shapes, counts = [], []

    def looked_at(*arguments, **options):
        shapes.append((len(arguments[3]), len(arguments[4])))
        return generate(*arguments, **options)

    monkeypatch.setattr(answers, "generate", looked_at)
    assert answer(*tiny, asked, max_tokens=5, progress=counts.append) == results
    assert (shapes, counts) == ([(4, 8)], [5])  # three images, five questions
    monkeypatch.setattr(answers, "ROWS", (2, 8))
    assert answer(*tiny, asked * 2, max_tokens=5, progress=counts.append) == results * 2
    assert (shapes[1:], counts[1:]) == ([(4, 8), (4, 2)], [8, 2])  # the last batch has as few rows as it needs


def test_progress_may_end_it_between_two_batches(tiny):
    asked, counts = collect(RECORDS * 40, tiny[2], turns="conversation").questions, []

    def stop(count):
        counts.append(count)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        answer(*tiny, asked, max_tokens=5, progress=stop)
    assert counts == [192] and len(asked) == 200


def test_a_record_that_cannot_be_asked_about_is_named(tiny):
    with pytest.raises(ValueError, match="record cut cannot be scored: "):
        answer_records(*tiny, [RECORDS[0], Record("cut", (b"no image",), RECORDS[0].turns)])


def test_accuracy_and_its_standard_error():
    results = [
        Result("k", (), "?", truth, said) for truth, said in (("red\n", "red"), ("a", "A."), ("b", "c"), ("d", ""))
    ]
    assert accuracy(results) == 0.5 and accuracy([]) == 0
    assert standard_error(0.5, 4) == 0.25  # sqrt(0.5 * 0.5 / 4)
    assert standard_error(0.0, 0) == 0
