"""How questions become groups of few shapes, and what the model reads of a group: drawn by hand."""

import dataclasses
import hashlib
import io

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from fastvlm_jax.evaluate.benchmark import Picture, Protocol, Row, ask
from fastvlm_jax.evaluate.groups import Group, Shape, build, fit, padded, plan
from fastvlm_jax.evaluate.published import read_parquet
from fastvlm_jax.evaluate.questions import Question, prepare
from fastvlm_jax.images.sizes import Size
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor

LLM = Decoder(vocab_size=100, width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
SQUARE = Size(16, 16, 16, 4)


def png(colour, size=(16, 16)):
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def question(name, length, *pictures, grids=None, size=SQUARE, turns=None):
    """A question about pictures that are named by their first letters, as its own row."""
    found = tuple(Picture(picture, lambda picture=picture: png(picture)) for picture in pictures)
    turns = turns or ask(*range(len(found)), "what?")
    grids = tuple(grids or [(0, 0)] * len(found))
    return Question(Row(name, "what?", found, None), turns, found, length, size if found else None, grids)


def test_prompts_are_padded_to_few_lengths():
    lengths = [1, 32, 33, 250, 256, 257, 320, 500, 513, 1000, 1025, 2049, 5000]
    assert [padded(n) for n in lengths] == [32, 32, 64, 256, 256, 320, 320, 512, 640, 1024, 1280, 2560, 5120]
    assert all(n <= padded(n) <= max(n + 31, 1.25 * n + 1) for n in range(1, 20_000))


def test_a_count_is_padded_to_the_next_size():
    assert [fit(count, (8, 24, 192)) for count in (0, 1, 8, 9, 24, 25, 192, 200)] == [0, 8, 8, 24, 24, 192, 192, 200]


def test_the_longest_prompts_come_first_and_keep_their_order_within_a_length():
    questions = [
        question("a", 20, "red"), question("b", 70), question("c", 40, "red"), question("d", 33, "blue"),
        question("e", 64, "red"), question("f", 20),
    ]  # fmt: skip
    groups = plan(questions, LLM)
    names = ["".join(questions[number].row.id for number in group.members) for group in groups]
    assert names == ["b", "cde", "f", "a"]
    assert [group.shape for group in groups] == [
        Shape(96, 8, 0, None), Shape(64, 8, 2, SQUARE), Shape(32, 8, 0, None), Shape(32, 8, 1, SQUARE)
    ]  # fmt: skip


def test_groups_of_a_bucket_have_one_shape_and_end_at_their_rows_or_images():
    asked = [question(str(i), 20, f"image {i // 3}") for i in range(60)]
    groups = plan(asked, LLM)
    assert [len(group.members) for group in groups] == [48, 12]  # 16 images, then 4
    assert {group.shape for group in groups} == {Shape(32, 48, 16, SQUARE)}
    assert [len(group.members) for group in plan(asked, LLM, batch_size=7)] == [7] * 8 + [4]
    assert {group.shape for group in plan(asked, LLM, batch_size=7)} == {Shape(32, 7, 4, SQUARE)}
    assert {group.shape for group in plan(asked, LLM, batch_size=1)} == {Shape(32, 1, 1, SQUARE)}
    assert [len(group.members) for group in plan(asked, LLM, shards=4)] == [24, 24, 12]  # 15 rows a shard, padded to 24
    # 4 GiB in float32 hold ten rows with 32 times 8 keys and values and 208 activations each, and as many logits.
    few = plan(asked, dataclasses.replace(LLM, vocab_size=2**30 // 10 - 32 * (8 + 208)))
    assert [len(group.members) for group in few] == [10] * 6
    tiles = [question("t", 20, *map(str, range(7)), grids=[(2, 2)] * 7)] * 2  # one row alone may have more slots
    assert [(len(group.members), group.shape.slots) for group in plan(tiles, LLM)] == [(2, 35)]


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, "chatml", 16, 4)


def test_rows_of_a_group_share_their_images_and_stand_at_their_places(processor):
    asked = [
        question("a", 0, "red"), question("b", 0, "blue", "red", turns=ask(0, "or", 1)), question("c", 0, "blue")
    ]  # fmt: skip
    group = Group(Shape(64, 4, 4, SQUARE), (0, 1, 2))
    batch, digests = build(group, asked, [0, 1, 2], processor)
    assert batch.images.shape == (4, 16, 16, 3) and batch.image_mask.tolist() == [True, True, False, False]
    assert [image[0, 0].tolist() for image in batch.images[:2]] == [[255, 0, 0], [0, 0, 255]]
    assert len(digests) == 2 and len(set(digests.values())) == 2
    placed = [row[row >= 0].tolist() for row in batch.image_index]
    red, blue = [0, 1, 2, 3], [4, 5, 6, 7]
    assert placed == [red, blue + red, blue, red]  # the fourth row repeats the first
    for row, tokens in zip(batch.segment_ids, batch.tokens, strict=True):
        assert (tokens[row == 0] == 0).all() and row.sum() > 8
    segment = processor.segment(asked[0].turns, True)
    assert batch.tokens[0, : len(segment.tokens)].tolist() == segment.tokens.tolist()
    assert batch.positions[0, : len(segment.tokens)].tolist() == list(range(len(segment.tokens)))

    # Who is not asked leaves its place to the first that is; the others stay where they are.
    rest, digests = build(group, asked, [1], processor)
    assert len(digests) == 2 and (rest.tokens == rest.tokens[1]).all()
    np.testing.assert_array_equal(rest.tokens[1], batch.tokens[1])
    np.testing.assert_array_equal(rest.images, batch.images)
    last, digests = build(group, asked, [2], processor)
    assert list(digests) == ["blue"] and not last.images[0].any()


def test_tiles_of_an_image_follow_each_other(tokenizer):
    tiles = Processor(tokenizer, "chatml", 16, 4, grids=((1, 2), (2, 1)))
    asked = [
        question("a", 0, "red", grids=[(1, 2)]),
        question("b", 0, "blue", "red", grids=[(2, 1), (1, 2)], turns=ask(0, "or", 1)),
    ]
    batch, _ = build(Group(Shape(64, 2, 8, SQUARE), (0, 1)), asked, [0, 1], tiles)
    assert batch.image_mask.sum() == 6
    placed = [row[row >= 0].tolist() for row in batch.image_index]
    assert placed == [list(range(12)), [*range(12, 24), *range(12)]]


def test_a_digest_is_of_all_images_of_a_row_even_of_those_that_its_prompt_leaves_out(processor):
    both = (Picture("red", lambda: png("red")), Picture("blue", lambda: png("blue")))
    asked = [Question(Row("a", "?", both, None), ask(0, "?"), both[1:], 9, SQUARE, ((0, 0),))]
    _, digests = build(Group(Shape(32, 1, 1, SQUARE), (0,)), asked, [0], processor)
    assert set(digests) == {"red", "blue"}


def test_an_image_that_cannot_be_read_is_named_with_its_row(processor):
    cut = Picture("cut.png", lambda: b"no image")
    asked = [Question(Row("7", "?", (cut,), None), ask(0, "?"), (cut,), 9, SQUARE, ((0, 0),))]
    with pytest.raises(ValueError, match=r"^row 7 cannot be asked: cut.png: "):
        build(Group(Shape(32, 1, 1, SQUARE), (0,)), asked, [0], processor)


def test_an_image_that_a_table_holds_for_each_question_is_encoded_once(processor, tmp_path):
    blue, red = png("blue"), png("red")
    cells = [{"bytes": data, "path": None} for data in (blue, red, blue)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "test.parquet")
    table = read_parquet([epath.Path(tmp_path / "test.parquet")], [], ["image"])
    rows = [Row(str(i), "what?", (cell["image"],), None) for i, cell in enumerate(table)]
    own = Protocol("own", "1", lambda row: ask(0, "what?"), None, 16, "a rule")
    asked = prepare(rows, own, processor, most_tokens=100).questions
    (group,) = plan(asked, LLM)
    assert group.shape.slots == 2
    batch, digests = build(group, asked, [0, 1, 2], processor)
    assert [image[0, 0].tolist() for image in batch.images] == [[0, 0, 255], [255, 0, 0]]
    placed = [row[row >= 0].tolist() for row in batch.image_index[:3]]
    assert placed == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    expected = [hashlib.sha256(data).hexdigest()[:16] for data in (blue, red, blue)]
    assert [digests[row.pictures[0].name] for row in rows] == expected
    last, digests = build(group, asked, [2], processor)
    assert last.images[0, 0, 0].tolist() == [0, 0, 255] and digests[rows[2].pictures[0].name] == expected[2]
