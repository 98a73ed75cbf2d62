"""What a log of a step says of several processes."""

from fastvlm_jax.metrics.step_log import slowest_host


def test_the_process_that_holds_up_the_others_is_named_with_its_seconds_beyond_the_fastest():
    assert slowest_host([(0.25, 0.5)]) == {"input_bound": 0.25}
    found = slowest_host([(0.25, 0.5), (0.75, 0.125), (0.5, 2.0)])
    assert found == {"input_bound": 0.75, "skew_seconds": 1.875, "slowest_process": 2}
