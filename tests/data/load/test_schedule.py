import itertools

import numpy as np
import pytest

from fastvlm_jax.data.index import RecordIndex
from fastvlm_jax.data.load.lengths import Bucket, Settings, find_unusable, make_record_lengths
from fastvlm_jax.data.load.packing import GroupShape, Lengths, fill_groups
from fastvlm_jax.data.load.schedule import Schedule
from fastvlm_jax.images.sizes import Size, make_sizes


def index_of(records, sizes=None, shortest=None, unusable=None):
    """Returns the index of (number of images, text tokens of each segment) pairs; every segment names all images."""
    images = [count for count, _ in records]
    lengths = [length for _, own in records for length in own]
    refs = [list(range(count)) for count, own in records for _ in own]
    sizes = sizes or [(100, 100)] * sum(images)
    return RecordIndex(
        num_images=np.array(images, np.uint16),
        width=np.array([w for w, _ in sizes], np.uint16),
        height=np.array([h for _, h in sizes], np.uint16),
        num_segments=np.array([len(own) for _, own in records], np.uint16),
        text=np.array(lengths, np.int32),
        shortest=np.array(shortest or lengths, np.int32),
        num_refs=np.array([len(r) for r in refs], np.uint16),
        refs=np.array(list(itertools.chain(*refs)), np.uint16),
        unusable=unusable or {},
    )


def settings(shape, groups=1, seed=0, tokens=0, **changes):
    """Returns settings with images of 64 x 64 pixels and `tokens` tokens each."""
    return Settings((Bucket(Size(64, 64, 64, tokens), GroupShape(*shape), 1.0),), groups, seed, **changes)


def random_records(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(0, 3)), rng.integers(3, 30, rng.integers(1, 6)).tolist()) for _ in range(count)]


def groups_of(schedule, k):
    plan = schedule.batch(k)
    return [schedule.group(plan, g) for g in range(len(plan.groups))]


def stream(schedule, batches):
    return [place.record for k in range(batches) for group in groups_of(schedule, k) for place in group]


def test_a_group_is_filled_as_worked_by_hand():
    schedule = Schedule([index_of([(1, [4, 6]), (1, [5, 3]), (1, [9])])], settings((2, 2, 10), groups=2, seed=None))
    first, second = groups_of(schedule, 0)
    assert [(place.record, place.slot, place.slots) for place in first] == [(0, 0, 1), (1, 1, 1)]
    # question, row, offset, length: row 0 |666666----|, then 4 beside it; record 1 opens row 1
    assert [tuple(p) for p in first[0].placements] == [(1, 0, 0, 6), (0, 0, 6, 4)]
    assert [tuple(p) for p in first[1].placements] == [(0, 1, 0, 5), (1, 1, 5, 3)]
    assert [tuple(p) for p in second[0].placements] == [(0, 0, 0, 9)]
    assert schedule.batches_per_epoch == 1
    assert (schedule.token_fill, schedule.image_fill) == (27 / 40, 3 / 4)
    with pytest.raises(IndexError):
        schedule.batch(1)


def test_the_open_group_takes_what_fits_it_best():
    # 20 tokens, 2 image slots: the largest of the four first, 12; then 8, which fills the 8 left, not 11 or 4.
    index = index_of([(0, [4]), (1, [11]), (1, [12]), (1, [8])])
    schedule = Schedule([index], settings((2, 1, 20)))
    groups = [[place.record for place in groups_of(schedule, k)[0]] for k in range(schedule.batches_per_epoch)]
    assert sorted(groups) == [[1, 0], [2, 3]]


def test_image_tokens_count_as_often_as_a_segment_names_the_image():
    index = index_of([(2, [5])])
    index = RecordIndex(
        **{**index.__dict__, "num_refs": np.array([3], np.uint16), "refs": np.array([1, 0, 1], np.uint16)}
    )
    schedule = Schedule([index], settings((2, 1, 40), tokens=10, seed=None))
    assert groups_of(schedule, 0)[0][0].placements[0].length == 5 + 3 * 10
    assert schedule.counts(schedule.batch(0))["tokens"] == 35


@pytest.mark.parametrize("rows", [1, 3])
def test_every_question_of_an_epoch_is_placed_once_and_nothing_overlaps(rows):
    records, shape = random_records(300), GroupShape(4, rows, 160)
    schedule = Schedule([index_of(records)], settings(shape, groups=2, seed=5))
    seen = []
    for k in range(schedule.batches_per_epoch):
        for group in groups_of(schedule, k):
            used, slots = np.zeros((shape.rows, shape.length), int), np.zeros(shape.images, int)
            for place in group:
                assert place.slots == records[place.record][0] and place.slot + place.slots <= shape.images
                slots[place.slot : place.slot + place.slots] += 1
                for question, row, offset, length in place.placements:
                    assert length == records[place.record][1][question] and offset + length <= shape.length
                    used[row, offset : offset + length] += 1
                    seen.append((place.record, question))
            assert used.max(initial=0) <= 1 and slots.max(initial=0) <= 1
    assert sorted(seen) == [(r, q) for r, (_, own) in enumerate(records) for q in range(len(own))]


def test_the_plan_depends_on_seed_and_position_alone():
    index = index_of(random_records(60))
    straight = Schedule([index], settings((4, 3, 64), groups=2, seed=5))
    plans = [groups_of(straight, k) for k in range(40)]
    assert straight.batches_per_epoch < 20  # several epochs
    jumping = Schedule([index], settings((4, 3, 64), groups=2, seed=5))
    for k in (39, 0, 17, 38, 3):
        assert groups_of(jumping, k) == plans[k]
    assert groups_of(Schedule([index], settings((4, 3, 64), groups=2, seed=6)), 0) != plans[0]


def test_epochs_follow_one_another_each_in_its_own_order():
    schedule = Schedule([index_of([(1, [5])] * 8)], settings((2, 1, 10)))
    epochs = [stream(schedule, 12)[8 * e : 8 * e + 8] for e in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Any version of numpy must give this order, or no run could be resumed.
    assert [schedule.draws(e).tolist() for e in range(2)] == [[3, 2, 1, 6, 0, 7, 4, 5], [7, 6, 4, 5, 3, 1, 0, 2]]


def test_evaluation_keeps_the_order_and_takes_data_sets_in_turn():
    records = random_records(50)
    schedule = Schedule([index_of(records)], settings((4, 3, 64), groups=2, seed=None))
    assert stream(schedule, schedule.batches_per_epoch) == list(range(50))
    two = Schedule([index_of([(0, [9])] * 4), index_of([(0, [9])] * 2)], settings((0, 1, 9), groups=6, seed=None))
    assert [(p.source, p.record) for group in groups_of(two, 0) for p in group] == [
        (0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)
    ]  # fmt: skip


def test_groups_of_a_last_batch_are_spread_over_the_data_shards():
    schedule = Schedule([index_of([(1, [9])] * 11)], settings((1, 1, 10), groups=8, seed=None))
    assert [g for g, number in enumerate(schedule.batch(1).groups) if number >= 0] == [0, 2, 5]


def test_text_alone_takes_no_image_slot():
    schedule = Schedule([index_of([(0, [5]), (0, [5])])], settings((0, 1, 10)))
    assert (schedule.batches_per_epoch, schedule.image_fill) == (1, 0.0)


def test_weights_are_shares_of_the_draws_and_no_record_comes_twice_before_all_others_came_once():
    indexes = [index_of([(0, [5])] * 6), index_of([(0, [5])] * 4)]
    schedule = Schedule(indexes, settings((0, 1, 5), weights=(1.0, 4.0)))
    drawn = [schedule.draws(epoch).tolist() for epoch in range(3)]
    assert [sum(record < 6 for record in epoch) for epoch in drawn] == [2, 2, 2]  # of 10 draws each
    assert sorted(record for epoch in drawn for record in epoch if record < 6) == [0, 1, 2, 3, 4, 5]
    again = [schedule.draws(epoch).tolist() for epoch in range(3, 6)]
    assert [{r for r in epoch if r < 6} for epoch in again] != [{r for r in epoch if r < 6} for epoch in drawn]
    counts = np.bincount([record - 6 for record in drawn[0] if record >= 6])
    assert counts.tolist() == [2, 2, 2, 2]
    plan = schedule.batch(0)
    assert schedule.counts(plan)["records"].sum() == 1


def test_a_record_that_cannot_be_used_gives_its_place_to_the_next():
    records = [(1, [5]), (3, [5]), (1, [5]), (1, [50])]
    schedule = Schedule([index_of(records, unusable={2: "torn"})], settings((2, 1, 10)))
    assert schedule.unusable == {
        1: "it takes 3 image slots, groups have 2: raise data.images_per_group",
        3: "a question and answer of 50 tokens, rows have 10: raise data.row_length",
        2: "torn",
    }
    assert sorted(schedule.draws(0).tolist()) == [0, 0, 0, 0]
    schedule = Schedule([index_of(records[:1] * 3 + [(1, [11])])], settings((2, 1, 10)))
    assert sorted(schedule.draws(0).tolist()) == [0, 0, 1, 2]


def test_a_text_longer_than_a_row_stays_if_its_newest_question_fits():
    index = index_of([(1, [30])], shortest=[8])
    assert groups_of(Schedule([index], settings((1, 1, 10))), 0)[0][0].placements[0].length == 10
    with pytest.raises(ValueError, match="record 0: a text of 30 tokens, rows have 10: raise"):
        Schedule([index], settings((1, 1, 10), overlong="reject"))


def buckets(resolutions, aspects, images=4, length=200):
    made = []
    for side, share in resolutions:
        for size in make_sizes(side, aspects, 64, lambda h, w: h * w // 4096):
            shape = GroupShape(images * 256**2 // (size.height * size.width), 1, length)
            made.append(Bucket(size, shape, share))
    return tuple(made)


def test_batches_of_one_size_with_more_of_the_small_images():
    rng = np.random.default_rng(9)
    records = [(int(rng.random() < 0.8), [int(rng.integers(5, 40))]) for _ in range(2000)]
    count = sum(images for images, _ in records)
    sizes = [((200, 100), (100, 100), (90, 160))[i] for i in rng.integers(0, 3, count)]
    made = buckets([(128, 0.25), (256, 0.75)], ((1, 1), (16, 9), (9, 16)))
    schedule = Schedule([index_of(records, sizes)], Settings(made, 8, 3))
    assert [(b.size.width, b.size.height, b.shape.images) for b in made] == [
        (128, 128, 16), (128, 64, 32), (64, 128, 32), (256, 256, 4), (320, 192, 4), (192, 320, 4)
    ]  # fmt: skip
    seen, by_side, texts_in = [], {128: 0, 256: 0}, set()
    first_image = np.cumsum([0] + [images for images, _ in records])
    for k in range(schedule.batches_per_epoch):
        plan = schedule.batch(k)
        size, shape, _ = made[plan.bucket]
        for group in groups_of(schedule, k):
            assert sum(place.slots for place in group) <= shape.images
            for place in group:
                seen.append(place.record)
                if not place.slots:
                    texts_in.add(plan.bucket)
                else:
                    by_side[size.side] += 1
                    width, height = sizes[first_image[place.record]]
                    assert (size.width > size.height, size.width < size.height) == (
                        width > height * 1.3,
                        height > width * 1.3,
                    )
    assert sorted(seen) == list(range(2000))
    assert texts_in == set(range(6))
    assert abs(by_side[128] / count - 0.25) < 0.03
    order = [schedule.batch(k).bucket for k in range(schedule.batches_per_epoch)]
    assert len(set(order[: len(order) // 2])) == len(set(order[len(order) // 2 :])) == 6  # spread over the epoch


def test_evaluation_uses_the_largest_resolution():
    made = buckets([(128, 0.9), (256, 0.1)], ())
    schedule = Schedule([index_of([(1, [5])] * 9)], Settings(made, 1, None))
    assert {made[schedule.batch(k).bucket].size.side for k in range(schedule.batches_per_epoch)} == {256}


def test_a_record_must_fit_the_groups_of_every_bucket():
    # An overview and a tile at 64 px, but an overview and four tiles at 32 px, more than the four slots of that size.
    made = (
        Bucket(Size(32, 32, 32, 4), GroupShape(4, 1, 200), 0.5),
        Bucket(Size(64, 64, 64, 16), GroupShape(2, 1, 200), 0.5),
    )
    index = index_of([(1, [7]), (1, [7])], [(40, 40), (20, 20)])
    records = make_record_lengths([index], Settings(made, 1, 0, grids=((1, 1), (2, 2))))
    assert find_unusable(records, "truncate") == {
        0: "it takes 5 image slots, groups have 4: raise data.images_per_group"
    }
    # Two rows of 40 tokens: 20 + 20 and 25 fit at 15 tokens per image; at 16, no two of 21, 21 and 26 share a row.
    made = (
        Bucket(Size(64, 48, 80, 15), GroupShape(1, 2, 40), 1.0),
        Bucket(Size(64, 64, 64, 16), GroupShape(1, 2, 40), 1.0),
    )
    records = make_record_lengths([index_of([(1, [5, 5, 10])])], Settings(made, 1, 0))
    assert find_unusable(records, "truncate") == {
        0: "its texts do not fit 2 rows of 40 tokens: raise data.rows_per_group"
    }


def test_tiles_take_slots_and_tokens_as_the_image_needs():
    # 64 px: an overview, and 2 x 2 tiles for the large image, 1 x 2 for the wide one, one for the small one
    index = index_of([(1, [7]), (1, [7]), (1, [7])], [(300, 300), (128, 60), (50, 50)])
    made = settings((7, 1, 100), tokens=4, seed=None, grids=((1, 1), (1, 2), (2, 2)))
    schedule = Schedule([index], made)
    groups = [
        [(p.record, p.slot, p.slots, p.placements[0].length) for p in g] for k in (0, 1) for g in groups_of(schedule, k)
    ]
    assert groups == [[(0, 0, 5, 27)], [(1, 0, 3, 19), (2, 3, 2, 15)]]


def test_a_mixture_of_text_short_and_long_samples_fills_its_slots():
    rng = np.random.default_rng(17)
    count = 20_000
    text = np.clip(rng.lognormal(4.6, 0.8, count), 10, 1500).astype(int)
    records = [(int(rng.random() > 0.15), [int(length)]) for length in text]
    schedule = Schedule([index_of(records)], settings((5, 1, 2048), groups=32, tokens=256))
    assert schedule.token_fill >= 0.95 and schedule.image_fill >= 0.90


def test_an_epoch_is_kept_on_disk_under_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    monkeypatch.setattr("fastvlm_jax.data.load.schedule._SLOW", -1)
    index = index_of(random_records(60))
    made = settings((4, 3, 64), groups=2)
    fresh = Schedule([index], made)
    for key, files in (("a", 1), ("a", 1), ("b", 2)):
        assert [groups_of(Schedule([index], made, key), k) for k in range(3)] == [groups_of(fresh, k) for k in range(3)]
        assert len(list((tmp_path / "schedules").iterdir())) == files
    Schedule([index], settings((4, 3, 64), groups=2, seed=1), "a")
    assert len(list((tmp_path / "schedules").iterdir())) == 3
    for kept in (tmp_path / "schedules").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert groups_of(Schedule([index], made, "a"), 1) == groups_of(fresh, 1)


def test_many_lanes_place_every_record_once_within_the_bounds():
    rng = np.random.default_rng(1)
    images, tokens = rng.integers(0, 3, 50_000), rng.integers(20, 900, 50_000).astype(np.int32)
    order, first = fill_groups(images, Lengths(np.arange(50_001), tokens), GroupShape(5, 1, 2048))
    assert sorted(order.tolist()) == list(range(50_000))
    assert first[0] == 0 and first[-1] == 50_000 and (np.diff(first) > 0).all()
    assert np.add.reduceat(tokens[order], first[:-1]).max() <= 2048
    assert np.add.reduceat(images[order], first[:-1]).max() <= 5
    assert tokens.sum() / (len(first) - 1) / 2048 > 0.95
    # Two lanes of one group each stay two groups.
    one = np.ones(5000, np.int32)
    assert fill_groups(one * 0, Lengths(np.arange(5001), one), GroupShape(0, 1, 2600))[1].tolist() == [0, 2500, 5000]


@pytest.mark.parametrize(
    "records, message",
    [
        ([(1, [11])], "none of the 1 records can be used; record 0: a question and answer of 11 tokens, rows have 10: "
         "raise data.row_length"),
        ([(3, [5])], "none of the 1 records can be used; record 0: it takes 3 image slots, groups have 2: raise "
         "data.images_per_group"),
        ([(1, [6, 6, 6])], "none of the 1 records can be used; record 0: its texts do not fit 2 rows of 10 tokens: "
         "raise data.rows_per_group"),
        ([], "the split holds no records: write the dataset again"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused(records, message):
    with pytest.raises(ValueError) as caught:
        Schedule([index_of(records)], settings((2, 2, 10)))
    assert str(caught.value) == message
