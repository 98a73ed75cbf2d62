"""Tests the clock of the benchmarks on functions whose turns and times are known."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvlm_jax.bench import clock
from fastvlm_jax.bench.page import markdown_table, milliseconds


def test_the_functions_take_turns_and_warm_up_off_the_clock():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = clock.take_turns(calls, runs=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(runs) for name, runs in times.items()} == {"a": 3, "b": 3}


def test_a_run_lasts_until_its_arrays_are_there():
    x = jax.block_until_ready(jnp.ones((1500, 1500)))
    program, seconds = clock.compile_ahead(jax.jit(lambda x: x @ x @ x @ x), x)
    assert seconds > 0
    made, ready = [], []
    calls = {"slow": lambda: made.append(program(x)) or made[-1], "next": lambda: ready.append(made[-1].is_ready())}
    clock.take_turns(calls, runs=2, warmup=1)
    assert ready == [True] * 3
    assert not program(x).is_ready()  # a call by itself returns before the array is there


def test_the_spread_interpolates_between_runs():
    seconds = [3.0, 1.0, 2.0, 4.0, 10.0]
    expected = statistics.quantiles(seconds, n=10, method="inclusive")
    assert clock.spread(seconds) == pytest.approx({"median": 3.0, "p10": expected[0], "p90": expected[-1]})


def test_the_most_that_a_process_held_is_counted_from_when_a_function_begins():
    def hold(megabytes):
        return lambda: np.ones(megabytes * 2**20, np.uint8).sum()

    clock.most_resident(hold(400))  # is forgotten
    before = clock.resident()
    assert clock.most_resident(hold(100)) - before == pytest.approx(100 * 2**20, abs=20 * 2**20)
    assert clock.resident() - before < 20 * 2**20


def test_the_memory_of_a_program_holds_its_arguments_and_results():
    program, _ = clock.compile_ahead(jax.jit(lambda x, y: x @ y), jnp.zeros((64, 128)), jnp.zeros((128, 32)))
    bytes_, source = clock.peak_memory(jax.devices()[0], [program])
    assert bytes_ >= 4 * (64 * 128 + 128 * 32 + 64 * 32) and "program" in source


@pytest.mark.parametrize(
    "seconds, text", [(0.00000512, "0.00512"), (0.00512, "5.12"), (0.0512, "51.2"), (0.5126, "513"), (5.1234, "5,123")]
)
def test_milliseconds_have_three_digits(seconds, text):
    assert milliseconds(seconds) == text


def test_a_table_in_markdown():
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
