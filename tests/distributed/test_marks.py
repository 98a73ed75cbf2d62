"""Who is behind and who is late, by the marks that processes tell; times are seconds, worked out by hand."""

from fastvlm_jax.distributed.marks import Mark, Marks


def marks(*told):
    """The marks of three processes; told are (process, count, time), of marks that allow 10 s."""
    found = Marks(3)
    for process, count, now in told:
        found.note(process, Mark(count, f"step {count}", 10.0), now)
    return found


def test_the_one_that_has_passed_the_fewest_places_is_late_and_not_those_that_wait_for_it():
    found = marks((0, 4, 100.0), (1, 4, 101.0), (2, 4, 102.0), (0, 5, 103.0), (2, 5, 104.0))
    assert found.behind() == ([1], Mark(4, "step 4", 10.0), 101.0)
    assert found.late(111.0) == ([], Mark(4, "step 4", 10.0))
    assert found.late(111.5) == ([1], Mark(4, "step 4", 10.0))


def test_a_mark_told_again_does_not_begin_its_time_anew_and_a_new_one_does():
    found = marks((0, 5, 100.0), (2, 5, 100.0), (1, 4, 100.0), (1, 4, 109.0))
    assert found.late(110.5)[0] == [1]
    found.note(1, Mark(5, "step 5", 10.0), 110.6)
    assert found.late(120.0)[0] == [] and found.late(120.7)[0] == [0, 1, 2]


def test_nobody_is_late_before_all_have_begun_or_when_nobody_could_listen():
    assert marks((0, 4, 0.0), (1, 4, 0.0)).late(1e9)[0] == []
    assert marks((0, 4, 0.0), (1, 4, 0.0), (2, 0, 0.0)).late(1e9)[0] == []
    found = marks((0, 4, 0.0), (1, 4, 0.0), (2, 4, 0.0))
    found.restart_clock(1000.0)
    assert found.late(1010.0)[0] == [] and found.late(1010.1)[0] == [0, 1, 2]


def test_a_step_that_usually_takes_long_and_work_that_may_take_long_are_allowed_more():
    start = Mark(7, "the start", 0.0)
    assert start.passed("step 1", 300.0, 2.0) == Mark(8, "step 1", 300.0)
    assert start.passed("step 1", 300.0, 60.0) == Mark(8, "step 1", 1200.0)
    assert start.passed("a save", 300.0, None) == Mark(8, "a save", 3600.0)
