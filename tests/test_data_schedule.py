import numpy as np
import pytest

from fastvlm_jax.data.schedule import GroupPlan, GroupShape, RecordIndex, Schedule, fill_groups


def index_of(records):
    """records: for each the number of its images and the lengths of its segments."""
    lengths = [length for _, own in records for length in own]
    first = np.cumsum([0] + [len(own) for _, own in records])
    images = np.array([images for images, _ in records])
    return RecordIndex([f"train/{i}" for i in range(len(records))], images, np.array(lengths, int), first)


def random_records(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(0, 3)), rng.integers(3, 30, rng.integers(1, 6)).tolist()) for _ in range(count)]


def test_a_group_is_filled_as_worked_by_hand():
    schedule = Schedule(index_of([(1, [4, 6]), (1, [5, 3]), (1, [9])]), GroupShape(2, 2, 10), groups=2, seed=None)
    first, second = schedule.plan(0, 0), schedule.plan(0, 1)
    assert (first.records, first.slots) == ((0, 1), (0, 1))
    # row 0 |666666----|  then 4 beside it; record 1 opens row 1
    assert [tuple(p) for p in first.placements] == [(0, 1, 0, 0, 6), (0, 0, 0, 6, 4), (1, 0, 1, 0, 5), (1, 1, 1, 5, 3)]
    assert [tuple(p) for p in second.placements] == [(2, 0, 0, 0, 9)]
    assert schedule.plan(1, 0) == GroupPlan()
    assert (schedule.num_groups, schedule.batches_per_epoch) == (2, 1.0)
    assert (schedule.token_fill, schedule.image_fill) == (27 / 40, 3 / 4)


def test_every_question_of_an_epoch_is_placed_once_and_nothing_overlaps():
    records, shape = random_records(300), GroupShape(4, 3, 64)
    schedule = Schedule(index_of(records), shape, groups=2, seed=5)
    seen = []
    for group in range(schedule.num_groups):
        plan = schedule.plan(*divmod(group, 2))
        used = np.zeros((shape.rows, shape.length), int)
        slots = np.zeros(shape.images, int)
        for record, slot in zip(plan.records, plan.slots, strict=True):
            slots[slot : slot + records[record][0]] += 1
            assert slot + records[record][0] <= shape.images
        for p in plan.placements:
            assert p.length == records[p.record][1][p.question] and p.offset + p.length <= shape.length
            used[p.row, p.offset : p.offset + p.length] += 1
            seen.append((p.record, p.question))
        assert used.max() == 1 and slots.max(initial=0) <= 1
        assert set(plan.records) == {p.record for p in plan.placements}
    assert sorted(seen) == [(r, q) for r, (_, own) in enumerate(records) for q in range(len(own))]


def test_the_plan_depends_on_seed_and_position_alone():
    index, shape = index_of(random_records(60)), GroupShape(4, 3, 64)
    straight = Schedule(index, shape, groups=2, seed=5)
    plans = [straight.plan(k, g) for k in range(40) for g in range(2)]
    assert straight.batches_per_epoch * 2 < 40  # several epochs
    jumping = Schedule(index, shape, groups=2, seed=5)
    for k in (39, 0, 17, 38, 3):
        assert [jumping.plan(k, g) for g in range(2)] == plans[2 * k : 2 * k + 2]
    regrouped = Schedule(index, shape, groups=8, seed=5)
    assert [regrouped.plan(k, g) for k in range(10) for g in range(8)] == plans
    assert Schedule(index, shape, groups=2, seed=6).plan(0, 0) != plans[0]


def test_epochs_follow_one_another_each_in_its_own_order():
    schedule = Schedule(index_of([(1, [5])] * 8), GroupShape(2, 1, 10), groups=1, seed=0)
    epochs = [[r for k in range(4 * e, 4 * e + 4) for r in schedule.plan(k, 0).records] for e in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Fixed for good: another numpy must give the same order, or no run could be resumed.
    assert [schedule.order(e).tolist() for e in range(2)] == [[3, 2, 1, 6, 0, 7, 4, 5], [7, 4, 5, 1, 6, 2, 0, 3]]


def test_epochs_of_unequal_length_miss_and_repeat_nothing():
    index, shape = index_of(random_records(40)), GroupShape(3, 2, 64)
    schedule = Schedule(index, shape, groups=1, seed=2)
    epochs = [fill_groups(index, shape, schedule.order(epoch)) for epoch in range(4)]
    assert len({len(plans) for plans in epochs}) > 1
    assert all(sorted(r for plan in plans for r in plan.records) == list(range(40)) for plans in epochs)
    stream = [plan for plans in epochs for plan in plans]
    assert [schedule.plan(k, 0) for k in range(len(stream))] == stream


def test_evaluation_keeps_the_order():
    records = random_records(50)
    schedule = Schedule(index_of(records), GroupShape(4, 3, 64), groups=2, seed=None)
    order = [r for group in range(schedule.num_groups) for r in schedule.plan(*divmod(group, 2)).records]
    assert order == list(range(50))


def test_text_alone_takes_no_image_slot():
    schedule = Schedule(index_of([(0, [5]), (0, [5])]), GroupShape(0, 1, 10), groups=1, seed=0)
    assert (schedule.num_groups, schedule.image_fill) == (1, 0.0)


@pytest.mark.parametrize(
    "records, message",
    [
        ([(1, [5]), (1, [5, 11])], "record train/1 has a text of 11 tokens: raise data.row_length, now 10"),
        ([(3, [5])], "record train/0 has 3 images: raise data.images_per_group, now 2"),
        ([(1, [6, 6, 6])], "record train/0 has 18 tokens of text that do not fit one group: raise data.row_length, "
         "now 10, or data.rows_per_group, now 2"),
        ([], "the split holds no records: write the dataset again"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_its_key(records, message):
    with pytest.raises(ValueError) as caught:
        Schedule(index_of(records), GroupShape(2, 2, 10), groups=1, seed=0)
    assert str(caught.value) == message
