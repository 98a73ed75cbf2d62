"""The paper's grids: their points with the tokens of its tables, the runs that they share, estimated chip-hours."""

import re

import pytest
from command import fastvlm
from paths import ROOT

from fastvlm_jax.config import differences, plain
from fastvlm_jax.sweep import dry_run, paper
from fastvlm_jax.sweep.grid import sweep_config
from fastvlm_jax.sweep.plan import make_plan

CONFIG = ROOT / "configs/resolution_scaling.py"
# Tokens of the paper: tables 1, 4, 5, 6 and 10. Those of tiles are (1 + rows x columns) x (side / 64)^2, as 1280 there.
FIGURE_1 = {
    "fastvithd-0.5b-256": 16, "fastvithd-0.5b-512": 64, "fastvithd-0.5b-768": 144, "fastvithd-0.5b-1024": 256,
    "convnext_l-0.5b-320": 100, "convnext_l-0.5b-512": 256, "convnext_l-0.5b-768": 576, "convnext_l-0.5b-1024": 1024,
    "convnext_xxl-0.5b-256": 64, "clip_vit_l_336-0.5b-336": 576, "siglip_so400m_384-0.5b-384": 729,
}  # fmt: skip
HD = {"256": 16, "512": 64, "768": 144, "1024": 256, "1536": 576, "2048-2x2": 1280}
FASTVIT = {"256": 64, "512": 256, "768": 576, "1024": 1024}
FIGURE_4 = {
    f"{encoder}-{llm}-{size}": tokens
    for llm in ("0.5b", "1.5b", "7b")
    for encoder, sizes in (("fastvithd", HD), ("mci2", FASTVIT))
    for size, tokens in sizes.items()
}
FIGURE_6 = {
    f"fastvithd-vicuna-7b-{size}": tokens
    for size, tokens in {
        "512": 64, "768": 144, "1024": 256, "1536": 576, "512-2x2": 80, "768-2x2": 180, "768-3x3": 160,
        "1024-2x2": 320, "1024-4x4": 272, "1152-3x3": 360, "1536-2x2": 720, "1536-3x3": 640, "1536-4x4": 612,
    }.items()
}  # fmt: skip


def told(monkeypatch, capsys, setup, *more):
    status, out, err = fastvlm(monkeypatch, capsys, "sweep", f"--config={CONFIG}:{setup}", "--dry_run", *more)
    assert (status, err) == (0, "")
    return out


@pytest.mark.parametrize(
    "setup, tokens, runs", [("paper-fig1", FIGURE_1, 16), ("paper-fig4", FIGURE_4, 36), ("paper-fig6", FIGURE_6, 14)]
)
def test_the_papers_points_have_the_papers_tokens(setup, tokens, runs, monkeypatch, capsys):
    out = told(monkeypatch, capsys, setup)
    head, _, tasks = out.partition("in this order:")
    rows = [line.split() for line in head.splitlines()[2:] if line]
    assert {row[0]: int(row[-2].replace(",", "")) for row in rows} == tokens
    # Points of one encoder and language model share the stage that aligns them.
    assert len(re.findall("  train-stage", tasks)) == runs
    assert len(re.findall("  evaluate-", tasks)) == len(tokens)


@pytest.mark.parametrize("setup, runs", [("documents", 10), ("documents-short", 4)])
def test_the_default_reads_at_sizes_whose_tokens_are_those_of_the_strides(setup, runs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    head, _, tasks = told(monkeypatch, capsys, setup).partition("in this order:")
    tokens = {row.split()[0]: int(row.split()[-2]) for row in head.splitlines()[2:] if row}
    hd, fastvit = {128: 4, 192: 9, 256: 16, 320: 25}, {128: 16, 192: 36, 256: 64, 320: 100}
    expected = {f"fastvithd-tiny-{side}": hd[side] for side in (hd if runs == 10 else (128, 256, 320))}
    expected |= {f"fastvit-tiny-{side}": count for side, count in fastvit.items() if runs == 10}
    assert tokens == expected
    assert len(re.findall("  train-", tasks)) == runs


def test_chip_hours_are_said_to_be_arithmetic_and_near_the_compilers_estimate(monkeypatch, capsys):
    out = told(monkeypatch, capsys, "paper-fig1", "--topology=v5e:4x4")
    assert "chip-hours of training on v5e:4x4, estimated by arithmetic alone" in out
    assert "Nothing ran on a TPU." in out and "compiler" not in out
    # 424 ms a step by the TPU compiler for stage 2 of 0.5b at 1024 px on v5e:4x4.
    (row,) = (line.split() for line in out.splitlines() if "train-stage2_instruct-fastvithd-0.5b-1024" in line)
    steps, step, unit, _, hours = row[-5:]
    assert unit == "ms" and 0.8 * 424 < float(step) < 1.2 * 424
    assert steps == "5,196"  # 665,000 / 128, rounded up
    assert abs(float(hours) - 5196 * float(step) / 1000 / 3600 * 16) < 0.06


def test_settings_that_do_not_fit_are_marked_and_can_be_fitted():
    c = sweep_config("one", "One", [paper.llava15("fastvithd", "vicuna-7b", 1024)], ["gqa"], ["fastvithd", "vicuna_7b"])
    own = make_plan(c, "w")
    given = dry_run.describe(own, "v5e:4x4")
    assert "1 runs (*) do not fit as they are" in given and "--config.fit=v5e:4x4" in given
    (row,) = (line.split() for line in given.splitlines() if "train-stage2" in line)
    assert row[-2] == "*"
    assert "2 runs left out that do not fit" in dry_run.describe(own, "v5e:1x1")
    c.fit = "v5e:4x4"
    made = make_plan(c, "w")
    fitted = dry_run.describe(made, "v5e:4x4")
    assert "*" not in fitted and row[0] in fitted  # the same run, for its results are the same
    before, after = (plain(tasks[1].config) for tasks in (own.tasks, made.tasks))
    changed = {key for key, _, _ in differences(before, after)}
    assert changed and changed <= {"mesh", "accumulate", "model.llm.remat", "model.vision.remat"}


def test_weights_that_are_still_needed_are_told(monkeypatch, capsys):
    out = told(monkeypatch, capsys, "paper-fig6", "--config.weights.vicuna_7b=/models/vicuna")
    assert out.splitlines()[-1] == "weights still to be given: --config.weights.fastvithd=DIR"


REFUSED = [
    (("sweep", f"--config={CONFIG}:paper-fig2", "--dry_run"), 2, "unknown setup 'paper-fig2': choose "),
    (("sweep", f"--config={CONFIG}:llava15", "--dry_run"), 2, "llava15 takes vision=DIR"),
    (("sweep", f"--config={CONFIG}:llava15,llm=3b,vision=x", "--dry_run"), 2, "a language model of 0.5b, 1.5b"),
    (("sweep", f"--config={CONFIG}:llava15,vision=/none", "--dry_run"), 1, "there is no model at /none"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--dry_run", "--topology=v5e:3x3"), 1, "v5e has no such slice"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--workdir=w", "--topology=v5e:4x4"), 2, "add --dry_run"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--dry_run", "--estimate=compiler"), 2, "add --topology"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--workdir=w", "--settings=my.env"), 2, "add --launcher"),
    (("sweep", f"--config={CONFIG}:paper-fig1"), 2, "--workdir is missing"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--dry_run=false"), 2, "--workdir is missing"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--workdir=w"), 1,
     "weights that are not given: add --config.weights.fastvithd=DIR --config.weights.qwen2_0_5b=DIR"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--workdir=w", "--config.weight.x=1"), 1, "there is no key 'weight'"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--workdir=gs://b/w"), 1, "must be a folder"),
    (("sweep", f"--config={CONFIG}:paper-fig1", "--workdir=w", "--remote=gs://b/w"), 1, "needs --launcher"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, status, message", REFUSED, ids=lambda x: str(x)[-40:])
def test_wrong_commands_end_in_a_line_and_leave_nothing(arguments, status, message, tmp_path, monkeypatch, capsys):
    arguments = [word.replace("--workdir=w", f"--workdir={tmp_path / 'w'}") for word in arguments]
    found, out, err = fastvlm(monkeypatch, capsys, *arguments)
    assert (found, out) == (status, "") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_your_own_encoder_by_its_architecture(tmp_path, monkeypatch, capsys):
    """A folder with a small FastViT alone is the encoder of every point."""
    from random_model import random_variables

    from fastvlm_jax import convert

    layers = dict(layers=(1, 1), embed_dims=(8, 32), mixers=("repmixer", "attention"), head_features=4)
    _, variables = random_variables({"vision": layers})
    convert.write(tmp_path / "my-encoder", "native", variables, {"vision": layers}, None, {})
    out = told(monkeypatch, capsys, f"llava15,llm=0.5b,vision={tmp_path / 'my-encoder'}")
    rows = [line.split() for line in out.splitlines() if line.startswith("  my_encoder")]
    assert [row[0] for row in rows] == [f"my_encoder-0.5b-{side}" for side in (256, 512, 768, 1024)]
    # Two stages: the image is divided by 4 and 2, so a side of 256 has 32 x 32 features.
    assert [row[-2] for row in rows] == ["1,024", "4,096", "9,216", "16,384"]
    assert f"vision={tmp_path}" not in out.splitlines()[-1] and "qwen2_0_5b=DIR" in out.splitlines()[-1]


def test_the_example_of_the_page_is_a_grid(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/resolution.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert block.count("\n") <= 15
    (tmp_path / "grid.py").write_text(block)
    monkeypatch.chdir(ROOT)
    status, out, err = fastvlm(monkeypatch, capsys, "sweep", f"--config={tmp_path / 'grid.py'}", "--dry_run")
    assert (status, err) == (0, "") and "easy-VQA by image size: 3 points, 4 training runs, 10 tasks" in out
