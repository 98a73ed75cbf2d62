"""The first of the two commands, shortened: every stage from 0 on a few steps, through the same script."""

import json
import os
import signal
import subprocess
import time

import pytest
from paths import ROOT

KEYS = [
    "accuracy", "standard_error", "baseline_accuracy", "test_questions", "train_seconds", "total_seconds",
    "export_max_abs_diff", "export_same_answers",
]  # fmt: skip


def quickstart(*arguments, cwd):
    # One device, as a person has; unoptimised code, because most of the time is compilation.
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_cpu_parallel_codegen_split_count=1"}
    command = ["bash", str(ROOT / "launch/quickstart.sh"), "--steps", "2", "--questions", "40", "--stage0", *arguments]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Started from another folder, interrupted while it trains, and started again."""
    folder = tmp_path_factory.mktemp("elsewhere")
    first = quickstart("--output", "run", cwd=folder)
    while first.poll() is None and not (folder / "run/stage1_align/metrics.jsonl").exists():
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    first.communicate()
    assert first.returncode != 0 and not (folder / "run/summary.json").exists()
    second = quickstart("--output", "run", cwd=folder)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    return folder / "run", output


def test_it_ends_with_a_table_and_a_summary(finished):
    folder, output = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == KEYS
    assert summary["test_questions"] == 40 and 0 < summary["train_seconds"] <= summary["total_seconds"] + 1
    assert "accuracy on the test split" in output and "baseline" in output and "report_samples.png" in output


def test_the_export_gives_the_same_logits_in_transformers(finished):
    assert 0 <= json.loads((finished[0] / "summary.json").read_text())["export_max_abs_diff"] <= 1e-4


def test_the_export_gives_the_same_answers_in_transformers(finished):
    assert json.loads((finished[0] / "summary.json").read_text())["export_same_answers"] == 40


def test_stages_chain_through_their_checkpoints(finished):
    lineage = json.loads((finished[0] / "stage2_instruct/config.json").read_text())["lineage"]
    stages = []
    while lineage:
        stages.append(lineage["stage"])
        lineage = lineage["parent"]
        lineage = lineage["parts"]["vision"] if lineage and "parts" in lineage else lineage
    assert stages == ["stage2_instruct", "stage15_pretrain", "stage1_align", "stage0_clip"]


def test_pictures_and_the_model_are_where_the_table_says(finished):
    for name in ("report_loss.png", "report_samples.png", "report.html", "export_hf/model.safetensors"):
        assert (finished[0] / name).stat().st_size > 500


def test_unknown_option_is_refused(tmp_path):
    process = quickstart("--stepz", "3", cwd=tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 2 and "unknown option --stepz" in output
