"""Answers in batches equal those of each question asked alone, in any batch, on any mesh, whatever is known already."""

import functools
import io

import jax
import numpy as np
import PIL.Image
import pytest
from flax import linen as nn
from small import ONE_STAGE, small_config

from fastvlm_jax import sharding
from fastvlm_jax.evaluate.answers import answer, answer_batches
from fastvlm_jax.evaluate.benchmark import Mark, Picture, Protocol, Row, ask
from fastvlm_jax.evaluate.groups import padded
from fastvlm_jax.evaluate.questions import prepare
from fastvlm_jax.generate import generate
from fastvlm_jax.images.sizes import Size
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.processor import Processor


def picture(number, width=16, height=16):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return Picture(f"image {number}", file.getvalue)


PICTURES = [picture(i, *size) for i, size in enumerate([(16, 16), (40, 20), (20, 40), (30, 30), (64, 20)])]
OWN = Protocol("own", "1", lambda row: row.fields["turns"], lambda answer, row: Mark(0.0, None), 5, "a rule")


WIDE, TALL = PICTURES[1:3]


def rows(*asked):
    """A row for each (text, pictures): the pictures stand before the text, the second of two behind it."""
    turns = [ask(*range(len(found)))[0][1] for _, found in asked]
    turns = [ask(*images[:1], "\n", text, *images[1:]) for images, (text, _) in zip(turns, asked, strict=True)]
    return [Row(str(i), "?", found, None, {"turns": turns[i]}) for i, (_, found) in enumerate(asked)]


TEXTS = ("what is it", "is it green", "blue", "red or blue")
LONG = "one two three " * 6
ROWS = {
    "square": rows(*[(text, (PICTURES[i],)) for text in TEXTS for i in range(3)],
                   *[(f"{text} or", (PICTURES[i], PICTURES[4])) for text in TEXTS[:2] for i in range(2)],
                   *[(text, ()) for text in TEXTS], (LONG, PICTURES[:1]), (LONG, PICTURES[3:4])),
    "tiles": rows(*[(text, (image,)) for text in TEXTS[1:3] for image in (WIDE, TALL)]),
    "buckets": rows(*[(text, (image,)) for text in TEXTS for image in (WIDE, TALL)]),
}  # fmt: skip
PROCESSORS = {
    "square": {},
    "tiles": {"grids": ((1, 2), (2, 1), (2, 2))},
    "buckets": {"sizes": (Size(8, 8, 8, 4), Size(8, 4, 12, 3), Size(8, 12, 4, 3))},
}


@pytest.fixture(scope="module")
def tiny(tokenizer):
    config = small_config("none", **ONE_STAGE)
    config.model.llm.vocab_size = -(-tokenizer.vocab_size // 8) * 8
    model = fastvlm.build(**config.model.to_dict())
    variables = jax.jit(lambda: nn.unbox(fastvlm.init_variables(model, jax.random.key(3))))()
    # Larger weights, or every answer would be the same.
    layers = variables["params"]["llm"]["layers"]
    for name, factor in (("q", 5), ("k", 5), ("v", 20), ("o", 20)):
        layers[name]["kernel"] *= factor
    return model, variables


@pytest.fixture(scope="module")
def asked(tiny, tokenizer):
    """Returns (processor, questions, the answer to each when it is asked alone by `generate`) of a kind of rows."""

    @functools.cache
    def of(kind):
        processor = Processor(tokenizer, "chatml", 8, 4, **PROCESSORS[kind])
        questions = prepare(ROWS[kind], OWN, processor, most_tokens=400).questions
        alone = [
            generate(*tiny, processor, [p.read() for p in q.pictures], [q.turns], [list(range(len(q.pictures)))],
                     max_tokens=5, length=padded(q.length))[0]
            for q in questions
        ]  # fmt: skip
        assert len(set(alone)) > len(alone) / 3  # a model that always says the same would prove nothing
        return processor, questions, alone

    return of


@pytest.mark.parametrize(
    "kind, batch_size, batches",
    [("square", 1, [2, 16, 4]), ("square", 7, [1, 3, 1]), ("buckets", None, [1, 1])],
)
def test_answers_do_not_depend_on_the_batch(tiny, asked, kind, batch_size, batches):
    processor, questions, alone = asked(kind)
    told = []
    assert answer(*tiny, processor, questions, max_tokens=5, batch_size=batch_size, told=told.append) == alone
    # A line for each length and image size: the batches of the long prompts, of those with images, of texts.
    assert sorted(int(line.split()[0]) for line in told) == sorted(batches)


@pytest.mark.parametrize("kind, sizes", [("square", (1, 1, 2, 2)), ("tiles", (2, 2, 2, 1))])
def test_answers_do_not_depend_on_the_mesh(tiny, asked, kind, sizes):
    processor, questions, alone = asked(kind)
    model, variables = tiny
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(sizes)])
    layout = sharding.shardings_of(kinds.boxed_variables(model), mesh)
    placed = jax.tree.map(sharding.place, variables, {name: layout[name] for name in variables})
    assert answer(model, placed, processor, questions, max_tokens=5, mesh=mesh, batch_size=2) == alone


def test_what_is_known_is_not_asked_and_changes_no_other_answer(tiny, asked):
    processor, questions, alone = asked("square")
    known = {number for number in range(len(questions)) if number % 3}
    found, counts = {}, 0
    for batch in answer_batches(*tiny, processor, questions, max_tokens=5, batch_size=7, known=known):
        found |= {number: answer.text for number, answer in batch.own.items()}
        counts += batch.count
    assert found == {number: text for number, text in enumerate(alone) if number not in known}
    assert counts == len(found)


def test_it_may_be_stopped_between_two_batches_and_reads_no_image_that_is_known(tiny, tokenizer):
    read = []

    def watched(name):
        return Picture(name, lambda: read.append(name) or PICTURES[0].read())

    asked = [Row(str(i), "?", (watched(str(i)),), None, {"turns": ask(0, "?")}) for i in range(40)]
    processor = Processor(tokenizer, "chatml", 8, 4)
    questions = prepare(asked, OWN, processor, most_tokens=400).questions
    assert read == []
    batches = answer_batches(*tiny, processor, questions, max_tokens=5, batch_size=8, known=range(8, 16))
    first = next(batches)
    assert (sorted(first.own), first.count) == (list(range(8)), 8)
    batches.close()
    assert set(read) <= {str(i) for i in [*range(8), *range(16, 24)]}  # a batch is built ahead
    digest = first.own[0].images
    assert len(digest) == 1 and all(found.images == digest for found in first.own.values())
