"""The plan of pairs: shares, passes and epochs of data sets of any size, without an index."""

import re

import numpy as np
import pytest
from small_pairs import draws_of

from fastvlm_jax.data.load.pair_schedule import PairSchedule


def test_several_data_sets_are_spread_evenly_over_an_epoch():
    schedule = PairSchedule([30, 9, 0, 1], groups=2, pairs=4, tokens=5, seed=1)
    first, second = draws_of(schedule, 0), draws_of(schedule, 1)
    everything = {(source, record) for source, size in enumerate([30, 9, 0, 1]) for record in range(size)}
    assert {place[:2] for place in first} == {place[:2] for place in second} == everything
    assert len(first) == 40 and first != second
    assert {place.visit for place in first} == {0} and {place.visit for place in second} == {1}
    assert [place.record for place in first if not place.source] != sorted(range(30))
    for k in range(10):
        counts = schedule.counts(schedule.batch(k))
        places = draws_of(schedule, k // 5)[k % 5 * 8 :][:8]
        assert counts["records"].tolist() == np.bincount([place.source for place in places], minlength=4).tolist()
        assert counts["records"][0] in (6, 5) or k % 5 == 2
        assert (counts["images"], counts["tokens"], counts["truncated"]) == (8, 40, 0)


def test_a_data_set_of_one_record_is_not_always_left_out():
    schedule = PairSchedule([1, 100], groups=2, pairs=15, tokens=5, seed=1)
    assert len(draws_of(schedule, 0)) == 90 and (0, 0, 0) in draws_of(schedule, 0)


def test_weights_set_the_shares_and_each_data_set_is_drawn_in_passes():
    schedule = PairSchedule([30, 10], groups=2, pairs=2, tokens=5, seed=1, weights=(0.4, 0.6))
    draws = [place for epoch in range(5) for place in draws_of(schedule, epoch)]
    assert schedule.batches_per_epoch == 10
    for source, size, share in ((0, 30, 16), (1, 10, 24)):
        own = [place for place in draws if place.source == source]
        assert len(own) == 5 * share
        for visit in range(len(own) // size):
            part = own[visit * size : (visit + 1) * size]
            assert sorted(place.record for place in part) == list(range(size))
            assert {place.visit for place in part} == {visit}


def test_a_plan_for_a_billion_records_is_made_in_place():
    schedule = PairSchedule([1_280_000_000, 7], groups=128, pairs=512, tokens=77, seed=1)
    assert schedule.batches_per_epoch == 19_531
    places = schedule.group(schedule.batch(2 * 19_531 + 11), 127)
    assert len({place.record for place in places}) == 512 and {place.visit for place in places} == {2}
    assert max(place.record for place in places) > 1_000_000_000
    assert schedule.where(1_280_000_003) == (1, 3) and schedule.number(1, 3) == 1_280_000_003


def test_another_seed_gives_another_order():
    one, two = (PairSchedule([50], groups=1, pairs=50, tokens=5, seed=seed) for seed in (1, 2))
    assert draws_of(one, 0) != draws_of(two, 0)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            [11],
            "4 x data.images_per_group=3 = 12 pairs is larger than the 11 records of an epoch: lower data.groups to 3",
        ),
        ([1, 1], "lower data.images_per_group to 2 or less"),
        ([0, 0], "the split holds no records: write the dataset again"),
    ],
)
def test_a_batch_larger_than_the_data_is_refused(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        PairSchedule(sizes, groups=4, pairs=3, tokens=5, seed=1)
    assert "\n" not in str(caught.value)


def test_a_batch_that_evaluation_does_not_have_is_no_batch():
    with pytest.raises(IndexError):
        PairSchedule([12], groups=4, pairs=3, tokens=5, seed=None).batch(1)
