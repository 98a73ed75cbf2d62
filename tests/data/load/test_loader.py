import io
import pathlib
import re
import resource
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
from loading import config, segments_of, sharding, take

from fastvlm_jax.data.load.from_config import eval_batches, make_loader
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

COUNT, BAD = 26, 5
COLORS = ["red", "green", "blue"]


def png(number):
    """Returns a grey square, as PNG, whose level is `number`."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (20, 20), number).save(buffer, format="PNG")
    return buffer.getvalue()


def record(i, image=None):
    """Returns a record with one to three questions about image i."""
    turns = [("user", (0, f"what is {i}?")), ("assistant", (COLORS[i % 3],))]
    for color in COLORS[: i % 3]:
        turns += [("user", (f"is {i} {color}?",)), ("assistant", ("no",))]
    return Record(f"train/{i}", (png(i) if image is None else image,), tuple(turns))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_shards(folder, "train", [record(i) for i in range(COUNT)])
    write_shards(folder, "bad", [record(i, png(i)[:50] if i == BAD else None) for i in range(COUNT)])
    write_shards(folder, "hopeless", [record(i, b"") for i in range(3)])
    write_shards(folder, "text", [Record("text/0", (), (("user", ("hi",)), ("assistant", ("no",))))])
    write_shards(folder, "mute", [Record("mute/0", (png(1),), (("user", (0, "hi")),))])
    texts = [part for i in range(COUNT) for _, content in record(i).turns for part in content if isinstance(part, str)]
    train_sentencepiece(texts, folder / "tokenizer.model", 320)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return Processor(load_tokenizer(folder), "chatml", 16, 2)


def assert_same(batches, others):
    jax.tree.map(np.testing.assert_array_equal, batches, others)


@pytest.fixture(scope="module")
def straight(folder, processor):
    return take(make_loader(config(folder), processor, "train", seed=3, sharding=sharding(1)), 6)


def test_fields_have_the_shapes_and_types_of_the_contract(straight):
    batch = straight[0]
    assert batch.images.shape == (8, 3, 16, 16, 3) and batch.images.dtype == np.uint8
    assert batch.image_mask.shape == (8, 3) and batch.image_mask.dtype == bool
    for name in ("tokens", "image_index", "targets", "loss_mask", "segment_ids", "positions"):
        array = getattr(batch, name)
        assert array.shape == (8, 4, 64) and array.dtype == (bool if name == "loss_mask" else np.int32)


@pytest.mark.parametrize("devices", [2, 8])
def test_batch_k_is_the_same_on_any_mesh(folder, processor, straight, devices):
    assert_same(take(make_loader(config(folder), processor, "train", seed=3, sharding=sharding(devices)), 6), straight)


def test_batches_lie_on_the_devices_of_their_groups(folder, processor):
    where = sharding(4)
    loader = make_loader(config(folder), processor, "train", seed=3, sharding=where)
    batch = next(loader)
    loader.close()
    assert batch.images.sharding.is_equivalent_to(where, batch.images.ndim)
    assert [shard.data.shape[0] for shard in batch.tokens.addressable_shards] == [2, 2, 2, 2]


@pytest.mark.parametrize("start", [1, 4])
def test_resuming_gives_exactly_the_next_batch(folder, processor, straight, start):
    loader = make_loader(config(folder), processor, "train", seed=3, sharding=sharding(2), start=start)
    assert_same(take(loader, 6 - start), straight[start:])
    assert loader.position == 6


def test_position_counts_batches_given_out_and_not_those_read_ahead(folder, processor):
    loader = make_loader(config(folder), processor, "train", seed=3, sharding=sharding(1))
    assert loader.position == 0
    next(loader), next(loader)
    time.sleep(0.2)
    assert loader.position == 2
    loader.close()


@pytest.mark.parametrize(
    "start, passed_over, given",
    [(0, [], [0, 1, 2]), (0, [0, 1], [2, 3, 4]), (1, [4, 2, 2, 0], [1, 3, 5]), (2, [2, 3, 4], [5])],
)
def test_batches_that_are_passed_over_are_not_drawn(folder, processor, straight, start, passed_over, given):
    where = dict(seed=3, sharding=sharding(2), start=start, passed_over=passed_over)
    loader = make_loader(config(folder), processor, "train", **where)
    assert_same(take(loader, len(given)), [straight[k] for k in given])
    assert loader.position == given[-1] + 1


def test_a_stream_that_ends_is_shorter_by_what_is_passed_over(folder, processor, straight):
    where = dict(seed=3, sharding=sharding(1), start=1, num_batches=4, passed_over=[0, 2, 5])
    loader = make_loader(config(folder), processor, "train", **where)
    assert len(loader) == 3
    assert_same([jax.tree.map(np.asarray, batch) for batch in loader], [straight[k] for k in (1, 3, 4)])


def test_another_seed_gives_another_order(folder, processor, straight):
    (other,) = take(make_loader(config(folder), processor, "train", seed=4, sharding=sharding(1)), 1)
    assert (other.tokens != straight[0].tokens).any()


@pytest.mark.parametrize("changes", [{"cache_images": True}, {"num_threads": 0, "prefetch": 0}, {"num_threads": 7}])
def test_cache_and_threads_change_nothing(folder, processor, straight, changes):
    assert_same(
        take(make_loader(config(folder, **changes), processor, "train", seed=3, sharding=sharding(1)), 6), straight
    )


def test_num_batches_ends_the_stream(folder, processor, straight):
    loader = make_loader(config(folder), processor, "train", seed=3, sharding=sharding(1), start=2, num_batches=3)
    assert len(loader) == 3
    assert_same([jax.tree.map(np.asarray, batch) for batch in loader], straight[2:5])


def read_back(batch, tokenizer, tokens_per_image=2):
    """Yields (text, supervised text, level of the grey image that the text refers to) of each segment."""
    for group, row, at in segments_of(batch):
        slots = {int(i) // tokens_per_image for i in batch.image_index[group, row, at] if i >= 0}
        (slot,) = slots
        assert batch.image_mask[group, slot]
        level = int(batch.images[group, slot, 8, 8, 0])
        answer = at[batch.loss_mask[group, row, at]]
        yield tokenizer.decode(batch.tokens[group, row, at]), tokenizer.decode(batch.targets[group, row, answer]), level


def test_every_segment_reads_its_own_image_and_learns_its_answer(folder, processor):
    batches = list(eval_batches(config(folder), processor, "train", sharding=sharding(1)))
    found = sorted(item for batch in batches for item in read_back(jax.device_get(batch), processor.tokenizer))
    expected = []
    for i in range(COUNT):
        turns = [next(part for part in content if part != 0) for _, content in record(i).turns]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            expected.append((f"user\n\n{question}\nassistant\n{answer}\n", f"{answer}\n", i))
    assert found == sorted(expected)


def test_targets_are_the_next_token_of_the_same_segment(straight, processor):
    for batch in straight:
        for group, row, at in segments_of(batch):
            assert at.tolist() == list(range(at[0], at[-1] + 1))
            assert batch.positions[group, row, at].tolist() == list(range(len(at)))
            assert batch.targets[group, row, at[:-1]].tolist() == batch.tokens[group, row, at[1:]].tolist()
            assert not batch.loss_mask[group, row, at[-1]]
            answer = batch.targets[group, row, at][batch.loss_mask[group, row, at]]
            assert answer[-2] == processor.tokenizer.special_id("<|im_end|>")
            # only the answer and its end are supervised
            assert batch.loss_mask[group, row, at].tolist() == [False] * (len(at) - 1 - len(answer)) + [True] * len(
                answer
            ) + [False]


def test_padding_gets_no_loss(straight):
    for batch in straight:
        padding = batch.segment_ids == 0
        assert padding.any()
        assert not batch.loss_mask[padding].any()
        assert (batch.image_index[padding] == -1).all()
        assert not batch.tokens[padding].any() and not batch.positions[padding].any()
        assert not batch.images[~batch.image_mask].any()


def test_evaluation_takes_the_records_in_order_and_fills_up_with_empty_groups(folder, processor):
    loader = eval_batches(config(folder), processor, "train", sharding=sharding(1))
    batches = [jax.tree.map(np.asarray, batch) for batch in loader]
    assert len(batches) == len(loader) == 2
    levels = np.concatenate([batch.images[..., 8, 8, 0][batch.image_mask] for batch in batches])
    assert levels.tolist() == list(range(COUNT))
    empty = ~batches[-1].image_mask.any(axis=1)
    assert empty.any() and not empty[0]
    assert not batches[-1].segment_ids[empty].any() and not batches[-1].loss_mask[empty].any()


def test_a_whole_conversation_is_one_segment(folder, processor):
    loader = eval_batches(config(folder, turns="conversation", row_length=96), processor, "train", sharding=sharding(1))
    found = [item for batch in loader for item in read_back(jax.device_get(batch), processor.tokenizer)]
    assert len(found) == COUNT
    assert ("user\n\nwhat is 1?\nassistant\ngreen\nuser\nis 1 red?\nassistant\nno\n", "green\nno\n", 1) in found


def test_text_alone_leaves_the_image_slots_empty(folder, processor):
    (batch,) = eval_batches(config(folder), processor, "text", sharding=sharding(1))
    assert not batch.image_mask.any() and batch.image_index.max() == -1 and batch.loss_mask.any()


def test_a_bad_image_is_replaced_counted_and_named(folder, processor, caplog):
    runs = []
    for devices in (1, 8):
        changes = {"max_substituted": 0.1}
        loader = make_loader(
            config(folder, **changes), processor, "bad", seed=3, sharding=sharding(devices), num_batches=3
        )
        runs.append([jax.tree.map(np.asarray, batch) for batch in loader])
        assert loader.substituted == 1
        loader.close()
    assert re.search(r"array_record record 5 \(train/5\) cannot be used, another", caplog.text)
    assert_same(*runs)
    found = [item for batch in runs[0] for item in read_back(batch, processor.tokenizer)]
    assert not any(f" {BAD}?" in text or f" {BAD} " in text for text, _, _ in found)
    # Record 6 takes its place, with as many of its questions as fit.
    assert sum(level == BAD + 1 for _, _, level in found) > sum(level == BAD + 2 for _, _, level in found) / 3
    assert all(f" {level}?" in text or f" {level} " in text for text, _, level in found)


def test_above_the_allowed_share_training_stops_with_the_list(folder, processor):
    loader = make_loader(config(folder, max_substituted=0.0), processor, "bad", seed=3, sharding=sharding(1))
    with pytest.raises(ValueError, match=r"1 records cannot be used, more than data.max_substituted=0.*\(train/5\)"):
        take(loader, 4)


def test_a_split_without_one_readable_image_is_refused(folder, processor):
    with pytest.raises(ValueError, match="none of the 3 records can be used; record 0: the image is empty") as caught:
        make_loader(config(folder), processor, "hopeless", seed=0, sharding=sharding(1))
    assert "\n" not in str(caught.value)


def test_closing_stops_the_threads(folder, processor):
    before = threading.active_count()
    loader = make_loader(config(folder), processor, "train", seed=3, sharding=sharding(1))
    next(loader)
    loader.close()
    loader.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "changes, split, message",
    [
        ({"path": "/absent"}, "train", "there is no dataset folder /absent: write one with `fastvlm data write"),
        ({}, "extra", "has no split 'extra': it has bad, hopeless, mute, text, train"),
        ({"turns": "all"}, "train", "unknown data.turns 'all': choose one of separate, conversation"),
        ({"row_length": 10}, "train", r"question and answer of \d+ tokens, rows have 10: raise data.row_length"),
        ({"images_per_group": 0}, "train", "takes 1 image slots, groups have 0: raise data.images_per_group"),
        ({"groups": 3}, "train", "data.groups 3 does not divide over NamedSharding.*: make it a multiple"),
        ({"turns": "conversation"}, "mute", "record 0: the conversation has no answer"),
        ({}, "mute", "none of the 1 records can be used; record 0: the conversation has no answer"),
    ],
)
def test_what_is_wrong_is_named_when_the_loader_is_made(folder, processor, changes, split, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        make_loader(config(folder, **changes), processor, split, seed=0, sharding=sharding(2))
    assert "\n" not in str(caught.value)


def test_too_little_memory_for_a_batch_says_which_settings_lower_it(folder):
    loader = make_loader(
        config(folder, image_size=8192), Processor(load_tokenizer(folder), "chatml", 8192, 2), "train", seed=3,
        sharding=sharding(1),
    )  # fmt: skip
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))  # a batch has 8 x 3 x 8192 x 8192 x 3 bytes
    try:
        with pytest.raises(MemoryError, match=r"^the loader needs more: lower data\.prefetch or data\.num_threads"):
            next(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        loader.close()
