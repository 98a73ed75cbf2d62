"""Tests the tables of docs/preflight.md that put figures side by side, from reports written by hand."""

from fastvlm_jax.preflight import table
from fastvlm_jax.preflight.table_cases import CASES


def case_of(name):
    """Returns the one case of a name."""
    (case,) = (case for case in CASES if case.name == name)
    return case


def encoder(images, cycles, temporaries):
    """A report of the encoder alone: so many M cycles an image, at a clock of 1.5 GHz, and GiB of temporaries."""
    return {
        "batch": {"images": images}, "topology": {"clock_hz": 1.5e9},
        "time": {"compute_s": images * cycles * 1e6 / 1.5e9}, "flops": {"compiled": 13.7e12},
        "memory": {"compiler": {"temporaries": temporaries * 2**30}},
        "operations": [{"operation": "forward vision/stem", "cycles": images * 5e5, "share": 0.25}],
    }  # fmt: skip


def cells(text, first):
    """Returns the cells of the row that begins with a word."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


PLAIN = case_of("encoder_stage2_instruct-0.5b_v5e-1x1_1x1x1x1_8_none")
KERNELS = case_of("encoder_stage2_instruct-0.5b_v5e-1x1_1x1x1x1_8")
ONE = case_of("images_stage2_instruct-0.5b_v5e-1x1_1x1x1x1_1")


def test_every_case_has_a_file_of_its_own_and_a_title():
    assert len({case.name for case in CASES}) == len(CASES) and {case.table for case in CASES} == set(table.TITLES)


def test_plain_and_kernels_stand_side_by_side():
    text = table.text({KERNELS: encoder(8, 40, 3.85), PLAIN: encoder(8, 90, 3.86), ONE: encoder(1, 50, 0.64)})
    assert cells(text, "8") == ["8", "90.0", "40.0", "3.86", "3.85"]
    assert cells(text, "1") == ["1", "-", "50.0", "-", "0.64"]  # what is not compiled yet
    assert "Plain: 90.0 M cycles an image (60.0 ms), 4.14 GB of temporaries, 13.7 TFLOP." in text
    assert text.index("With kernels: 40.0 M cycles an image") < text.index("Plain: 90.0")
    assert text.count("| `forward vision/stem` | 0.50 | 25.0% |") == 2


def test_the_papers_hours_stand_beside_the_estimated_ones():
    """Stage 1.5 took 77 hours on 8 H100: 616 H100-hours."""
    case = case_of("stage15_stage15_pretrain-7b_v5p-2x2x4")
    text = table._paper({case: {"time": {}, "stage": {"hours": 30.25, "chip_hours": 484.0}}})
    assert cells(text, "Stage 1.5") == ["Stage 1.5", "77 h", "616", "v5p:2x2x4", "30.2", "484"]
