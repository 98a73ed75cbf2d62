"""Tests `fastvlm bench kernels --topology`: floors worked by hand, a row from real programs, what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from command import fastvlm
from jax.experimental import pallas as pl
from paths import ROOT

from fastvlm_jax.preflight import bench_kernels, topology
from fastvlm_jax.preflight.bench_kernels import Case
from fastvlm_jax.preflight.hlo.cost import Operation, Program
from fastvlm_jax.preflight.hlo.schedule import Schedule

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
V5E = topology.parse("v5e:1x1")


@pytest.mark.parametrize(
    "case, direction, cores, least",
    [
        # 8 x 64 x 64 positions of 3 vectors of lanes, 8 positions a vector; 49 multiplies and 49 adds, 4 a bundle.
        (Case("depthwise", 7, (64, 64, 384)), "forward", 1, {"vector units": 301_056, "HBM": 92_366}),
        (Case("depthwise", 7, (64, 64, 384)), "backward", 1, {"vector units": 602_112, "HBM": 138_549}),
        (Case("depthwise", 7, (64, 64, 384)), "forward", 2, {"vector units": 150_528, "HBM": 92_366}),
        # 96 channels take a whole vector of 128, but no more memory than they have.
        (Case("depthwise", 3, (256, 256, 96)), "forward", 1, {"vector units": 294_912, "HBM": 369_465}),
        # A fourth of the positions with twice the channels: results of half the size of x.
        (Case("depthwise", 7, (64, 64, 384), 2), "forward", 1, {"vector units": 150_528, "HBM": 69_275}),
        (Case("depthwise", 7, (64, 64, 384), 2), "backward", 1, {"vector units": 301_056, "HBM": 115_458}),
        # 2 FLOPs x 32,768 positions x 384 x 1,536 x 2 products, 131,072 a cycle; 3 maps of 25 MB.
        (Case("pointwise", 1, (64, 64, 384)), "forward", 1, {"matrix units": 589_824, "HBM": 138_549}),
        (Case("pointwise", 1, (64, 64, 384)), "backward", 1, {"matrix units": 1_474_560, "HBM": 138_549}),
        # Of 25 MB each: x twice and y; x and dy twice and dx.
        (Case("batch_norm", 1, (64, 64, 384)), "forward", 1, {"HBM": 138_549}),
        (Case("batch_norm", 1, (64, 64, 384)), "backward", 1, {"HBM": 230_915}),
    ],
)
def test_the_floor_of_each_resource(case, direction, cores, least):
    assert bench_kernels.floor(case, 8, direction, V5E, cores) == pytest.approx(least, rel=1e-4)


def operation(cycles, schedule=None, trips=1, traffic=0.0):
    return Operation("encoder", "fusion", cycles, trips, 0.0, traffic, "main", "", 0.0, schedule)


def test_schedules_count_where_there_are_some_and_estimates_elsewhere():
    found = Program([operation(900, Schedule(500, 0, 0), trips=2), operation(70), operation(None)], [], [])
    assert bench_kernels.scheduled(found, V5E) == 2 * 500 + 70


def test_no_program_takes_less_time_than_its_bytes():
    second = 197e12 / 131_072  # cycles
    fetches = [operation(None, traffic=819e9, trips=2), operation(9, Schedule(9, 0, 0))]
    assert bench_kernels.scheduled(Program(fetches, [], []), V5E) == pytest.approx(2 * second)


def test_the_table_has_both_ratios_and_the_one_to_the_floor():
    row = {
        "kernel": "depthwise 7x7", "map": [8, 64, 64, 384], "pass": "forward", "xla_estimate": 1.2e6,
        "xla_bundles": 0.36e6, "cycles": 0.4e6, "bound": "bundles", "floor": 0.3e6, "floor_bound": "vector units",
    }  # fmt: skip
    found = {"topology": "v5e:1x1", "images": 8, "versions": {"libtpu": "0.0.52"}, "rows": [row]}
    first, _, header, _, line = bench_kernels.text(found).splitlines()
    assert "8 images, ESTIMATED by the TPU compiler (libtpu 0.0.52); nothing ran on a TPU" in first
    cells = dict(zip(*([cell.strip() for cell in text.split("|")[1:-1]] for text in (header, line)), strict=True))
    assert cells["map"] == "8x64x64x384" and cells["bound by"] == "bundles" and cells["floor of"] == "vector units"
    assert (cells["XLA, estimate"], cells["XLA, bundles"], cells["kernel"], cells["floor"]) == (
        "1.20", "0.36", "0.40", "0.30",
    )  # fmt: skip
    assert (cells["XLA / kernel, estimate"], cells["bundles"], cells["kernel / floor"]) == ("3.00", "0.90", "1.33")


def test_every_function_with_kernels_has_its_rows_at_1024_px():
    names = {(case.name, case.map[0]) for case in bench_kernels.CASES}
    assert {("depthwise 7x7", side) for side in (256, 128, 64, 32, 16)} < names
    assert {("depthwise 7x7, stride 2", side) for side in (256, 128, 64, 32)} < names
    for name in ("depthwise 3x3", "pointwise block", "BatchNorm"):
        assert {(name, side) for side in (256, 128, 64)} < names
    assert all(case.map[0] * case.map[2] == 256 * 96 for case in bench_kernels.CASES)


def test_a_program_is_the_same_wherever_its_kernel_stands_in_the_source():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def lowered(kernel):
        call = pl.pallas_call(kernel, out_shape=x, name="double")
        return jax.jit(call).trace(x).lower(lowering_platforms=("tpu",)).as_text()

    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    here = lowered(kernel)

    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    there = lowered(kernel)

    def kernel(x_ref, y_ref):
        y_ref[...] = 3 * x_ref[...]

    assert here != there and bench_kernels.without_places(here) == bench_kernels.without_places(there)
    assert bench_kernels.without_places(lowered(kernel)) != bench_kernels.without_places(here)


ONE_ROW = """
import json
from fastvlm_jax.preflight import bench_kernels, topology
topology.set_environment()
print(json.dumps(bench_kernels.measure("v5e:1x1", 2, [bench_kernels.Case("depthwise", 3, (64, 64, 64))])))
"""


@needs_compiler
def test_a_row_of_real_programs(monkeypatch, tmp_path):
    """2 x 64 x 64 x 64: 1,024 vectors with 9 multiplies and 9 adds, 4 a bundle; HBM would take 3,849 cycles."""
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))

    def run():
        command = [sys.executable, "-c", ONE_ROW]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout), done.stderr

    found, told = run()
    assert told.count("compiling depthwise 3x3") == 4 and found["images"] == 2
    forward, backward = found["rows"]
    assert (forward["kernel"], forward["map"], forward["pass"]) == ("depthwise 3x3", [2, 64, 64, 64], "forward")
    assert forward["floor"] == pytest.approx(1024 * 9 * 2 / 4) and forward["floor_bound"] == "vector units"
    assert backward["floor"] == pytest.approx(1024 * 9 * 2 * 2 / 4)
    for row in found["rows"]:
        # A schedule has no fewer bundles than its multiply-adds need, and no form takes ten times as long.
        assert row["floor"] < row["cycles"] < 10 * row["floor"] and row["bound"] == "bundles"
        assert row["floor"] < row["xla_bundles"] < 10 * row["floor"] and row["xla_estimate"] > row["floor"]
    again, told = run()
    assert again == found and "compiling" not in told


@pytest.mark.parametrize(
    "options, status, words",
    [
        (["--topology=v5e:3x3"], 1, "v5e has no such slice: choose 1x1, "),
        (["--topology=h100"], 1, "--topology=h100: write GENERATION:SHAPE, as v5e:4x4"),
        (["--topology=v5e:1x1", "--rows=0"], 2, "--rows"),
        (["--rows=4"], 2, "--rows is for --topology: leave it out, or name a TPU, as --topology=v5e:1x1"),
        (["--output=x.json"], 2, "--output is for --topology"),
    ],
)
def test_wrong_options_end_in_one_line(monkeypatch, capsys, options, status, words):
    found, out, err = fastvlm(monkeypatch, capsys, "bench", "kernels", *options)
    assert (found, out) == (status, "") and words in err and err.count("\n") == 1


def test_without_the_compiler_one_line_says_how_to_install_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else real(name, *rest)
    )
    before = os.environ.get("LIBTPU_INIT_ARGS")
    status, out, err = fastvlm(monkeypatch, capsys, "bench", "kernels", "--topology=v5e:1x1")
    assert os.environ.get("LIBTPU_INIT_ARGS") == before  # the flags for schedules went with the command
    assert (status, out) == (1, "") and "pip install 'fastvlm_jax[preflight]' (libtpu)" in err and err.count("\n") == 1
