"""What a run tells of itself: rates, MFU, memory, traces of steps, Weights & Biases."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
import types

import jax
import pytest
import wandb
from command import fastvlm
from paths import HELPERS, ROOT
from PIL import Image
from small import ask, small_config
from trace_cases import CASES

from fastvlm_jax import chips
from fastvlm_jax.data.load.loader import Flow
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.metrics import profiling, throughput, tracking
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.models import fastvlm as models
from fastvlm_jax.models import kinds
from fastvlm_jax.text.tokenizer import train_sentencepiece
from fastvlm_jax.train import train

LLM = dict(width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=32, vocab_size=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen questions about pictures of one colour."""
    folder = tmp_path_factory.mktemp("data")
    train_sentencepiece(["user what is it assistant red green blue"], folder / "tokenizer.model", 300)
    records = []
    for i, colour in enumerate(["red", "green", "blue", "red"] * 4):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), colour).save(file, "PNG")
        records.append(Record(f"{i}", (file.getvalue(),), ask(("what is it", colour))))
    write_shards(folder, "train", records)
    return folder


RUN = dict(steps=8, log_every=3, eval_every=4, mesh=(1, 1, 1, 1), wandb="project")


def config(data):
    return small_config(data, **RUN)


def in_a_process(script, *arguments, **environment):
    """stderr of a Python program. Traces are not started here: after a test that has loaded libtpu it would crash."""
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(HELPERS)!r}); sys.modules['torch'] = None\n{script}",
        *map(str, arguments),
    ]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def traced(data, tmp_path_factory):
    """The workdir of a run of 8 steps: two are traced, all go to Weights & Biases, written offline."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    script = "import jax, pathlib, small, fastvlm_jax.train as t\n"
    script += f"config = small.small_config(sys.argv[1], **{RUN!r})\n"
    script += "t.train(config, pathlib.Path(sys.argv[2]), jax.devices()[:1], profile='2:3')"
    stderr = in_a_process(script, data, workdir, WANDB_MODE="offline")
    assert f"steps 2 to 3 are traced: {workdir / 'profile'}" in stderr
    return workdir


def test_seconds_of_a_step_are_the_mean_over_the_interval_without_validation(traced):
    rows = read_metrics(traced)
    # Validation after step 4 restarts the clock: steps 1 to 3, then 5 and 6, then 7 and 8.
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert [row["images/s"] * row["step_seconds"] for row in rows] == pytest.approx([8, 8, 8])  # 8 groups of one image
    assert 2 * rows[2]["step_seconds"] == pytest.approx(rows[2]["seconds"] - rows[1]["seconds"], abs=0.1)


def test_a_cpu_has_no_known_peak_and_tells_no_memory(traced):
    assert chips.peak_flops(jax.devices()) is None and throughput.memory_scalars(jax.devices()) == {}
    assert not {key for row in read_metrics(traced) for key in row if "mfu" in key or "hbm" in key}


@pytest.mark.parametrize(
    "kind, devices, tflops",
    [
        ("TPU v4", [(0, 0, 0), (1, 0, 0)], 550),
        ("TPU v5 lite", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], 788),
        ("TPU v5", [(0, 0, 0)], 459),
        ("TPU v5p", [(0, 0, 0)], 459),
        ("TPU v6 lite", [(0, 0, 0)], 918),
        ("TPU7x", [(0, 0, 0), (0, 0, 0)], 2307),  # two devices a chip
        ("NVIDIA H100 80GB HBM3", [None] * 8, 7912),
        ("NVIDIA H100 PCIe", [None], 756),
        ("NVIDIA H200", [None], 989),
        ("NVIDIA A100-SXM4-80GB", [None], 312),
    ],
)
def test_peak_is_that_of_all_chips(kind, devices, tflops):
    made = [
        types.SimpleNamespace(device_kind=kind, id=i, **({"coords": at} if at else {})) for i, at in enumerate(devices)
    ]
    assert chips.peak_flops(made) == tflops * 1e12


def test_memory_is_that_of_the_fullest_device_of_this_process():
    def device(process, used, peak):
        return types.SimpleNamespace(
            process_index=process, memory_stats=lambda: {"bytes_in_use": used, "peak_bytes_in_use": peak}
        )

    devices = [device(0, 3e9, 5e9), device(0, 4e9, 4.5e9), device(1, 9e9, 9e9)]
    assert throughput.memory_scalars(devices) == {"hbm_gb": 4.0, "hbm_peak_gb": 5.0}


def test_mfu_is_of_what_was_really_there():
    """A decoder alone, all of it learning: 6 FLOPs a token and weight, and the attention's visible pairs."""
    model = models.build(None, LLM)
    trainable = ["llm/embedding", *(f"llm/layers/{name}/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down"))]
    flow = Flow(0, 1000, 0, (0,), 0.0, {})
    weights = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)
    attention = 2 * 2 * 16 * (64 + 1) / 2  # layers, two products of 16 channels, keys seen on average
    found = throughput.mfu_scalars(model, trainable, flow, 2.0, row_length=64, peak=1e9)
    assert found["mfu/llm"] == pytest.approx(1000 * 6 * (weights + attention + 16 * 64) / 2e9)
    assert found["mfu"] == found["mfu/llm"] and found["mfu/vision"] == 0
    assert throughput.mfu_scalars(model, trainable, flow, 2.0, row_length=64, peak=None) == {}


def test_mfu_of_the_encoder_counts_images_at_their_own_sizes(data):
    model = models.build(**config(data).model.to_dict())
    trainable = [path for path in _paths(model) if path.startswith("vision/")]

    def vision(sizes, tokens=0):
        flow = Flow(0, tokens, 0, (0,), 0.0, sizes)
        return throughput.mfu_scalars(model, trainable, flow, 1.0, row_length=80, peak=1e9)["mfu/vision"]

    assert vision({(16, 16): 6, (32, 32): 1}) == pytest.approx(6 * vision({(16, 16): 1}) + vision({(32, 32): 1}))
    assert vision({(32, 32): 1}) > 4 * vision({(16, 16): 1}) > 0  # attention over 16 positions costs more than 4 x 4
    assert vision({}, tokens=80) == 0


def _paths(model):
    from flax.traverse_util import flatten_dict

    return flatten_dict(kinds.abstract_variables(model)["params"], sep="/")


def events(folder):
    paths = list(folder.rglob("*.trace.json.gz"))
    return json.loads(gzip.decompress(paths[0].read_bytes()))["traceEvents"] if paths else []


def steps_in(folder):
    return [int(event["args"]["step_num"]) for event in events(folder) if event.get("name") == "train"]


def test_the_chosen_steps_and_no_other_are_in_the_trace(traced):
    (file,) = traced.glob("profile/plugins/profile/steps_2_3/*.xplane.pb")
    # Operations are named by their modules; behind the point stands which function of one.
    assert b"FastVLM.encode/vision/patch_embed_1/large.term/" in file.read_bytes()
    assert steps_in(traced) == [2, 3]
    modules = {event.get("args", {}).get("hlo_module", "") for event in events(traced)}
    assert "jit_train_step" in modules, modules


def test_a_resumed_run_has_nothing_left_to_trace_and_goes_on_as_the_same_wandb_run(data, traced, monkeypatch, capsys):
    before = sorted(traced.glob("profile/**/*"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config(data), traced, jax.devices()[:1], profile="2:3")
    assert "--profile: the run goes on after step 8, nothing is left to trace" in capsys.readouterr().err
    assert sorted(traced.glob("profile/**/*")) == before
    name = (traced / tracking.ID).read_text().strip()
    runs = [path for path in (traced / "wandb").glob("offline-run-*") if path.is_dir()]
    assert len(runs) == 2 and all(path.name.endswith(f"-{name}") for path in runs)
    (first,) = (path for path in traced.glob("wandb/offline-run-*/*.wandb") if b"step_seconds" in path.read_bytes())
    content = first.read_bytes()
    assert content.count(b"grad_norm") >= 3 and b"project" in content and b"chatml" in content


def test_a_trace_covers_what_is_left_of_its_steps_and_what_a_stopped_run_made_of_them(tmp_path):
    in_a_process("import trace_cases\ntrace_cases.write(sys.argv[1])", tmp_path)
    for i, (*_, wanted) in enumerate(CASES):
        assert steps_in(tmp_path / str(i)) == wanted
    assert steps_in(tmp_path / "stopped") == [1, 2]


@pytest.mark.parametrize("wrong", ["5:4", "0:3", "x", "2:", "-1:2", "6:9"])
def test_steps_to_trace_are_of_the_run_and_in_order(wrong):
    with pytest.raises(ValueError, match=f"--profile={wrong}"):
        profiling.parse_steps(wrong, 5)
    assert profiling.parse_steps("5:9", 5) == (5, 9) and profiling.parse_steps("3", 5) == (3, 3)


def test_a_wrong_range_is_one_line_and_nothing_is_written(data, monkeypatch, capsys, tmp_path):
    arguments = ["--config", f"tests/helpers/small.py:{data}", "--workdir", tmp_path / "run", "--profile=5:9"]
    monkeypatch.chdir(ROOT)
    status, _, stderr = fastvlm(monkeypatch, capsys, "train", *arguments)
    assert status == 1 and stderr.count("\n") == 1 and "--profile=5:9: the run has 4 steps" in stderr, stderr
    assert not (tmp_path / "run").exists()


def test_wandb_without_the_package_or_a_login_stops_before_the_training(data, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(
        ValueError, match=r"^wandb='project': nobody is logged in; run `wandb login`.*--config.wandb empty$"
    ):
        train(config(data), tmp_path / "run", jax.devices()[:1])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^wandb='project': the package is not installed; pip install"):
        train(config(data), tmp_path / "run", jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def test_a_network_that_fails_leaves_the_run_offline(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(tracking, "MINUTE", 2.0)
    wandb.teardown()  # what it read of the environment before
    tracker = tracking.open_run("project", tmp_path, "name", {})
    tracker.write(1, {"loss": 2.5})
    tracker.close()
    assert "written offline" in capsys.readouterr().err
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_sample_answers_become_a_table_and_an_error_of_wandb_is_told_once_and_stops_nothing(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    tracker = tracking.open_run("project", tmp_path, "name", {})
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.jpg")
    row = {"id": "7", "question": "what is it", "answer": "blue", "references": ["red"], "score": 0.0, "images": []}
    tracker.write_predictions(3, [row | {"images": ["red.jpg"]}, row], tmp_path)
    tracker.close()
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/predictions*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["id", "image", "question", "answer", "truth", "score"]
    assert table["data"] == [["7", image, "what is it", "blue", "red", 0.0] for image in ("Image", None)]
    (sent,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    named = rb"media/images/\w+/red\.jpg"
    for _ in range(100):  # wandb's own process writes it, in its own time
        if re.search(named, sent.read_bytes()):
            break
        time.sleep(0.1)
    assert len(re.findall(named, sent.read_bytes())) == 1
    tracker.write(1, {"loss": 2.5})  # the run is over: wandb raises
    tracker.write(2, {"loss": 2.5})
    assert capsys.readouterr().err.count("no longer written to") == 1
