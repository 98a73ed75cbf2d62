"""`fastvlm bench step`: parts against the trainer's step, counts by hand, and nothing of the data pipeline imported."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import fastvlm
from paths import ROOT
from small import ONE_STAGE, small_config

from fastvlm_jax import losses, optim, stage
from fastvlm_jax.bench import attention, step, step_page
from fastvlm_jax.config_values import lora_of
from fastvlm_jax.kernels.attention import plain
from fastvlm_jax.models import fastvlm as models
from fastvlm_jax.models import kinds, lora

# What a machine with a GPU may lack, and no benchmark of the model needs.
UNNEEDED = ("grain", "array_record", "tensorboard", "tensorflow_datasets", "pyarrow", "pypdfium2", "wandb", "libtpu")
FLAGS = [f"--config.{key.replace('__', '.')}={value}" for key, value in ONE_STAGE.items()]
# A frozen encoder and one layer: compiling is most of what the command takes.
FLAGS += ["--config.groups=(('vision/.*', 0.0, 0.0), ('.*', 0.001, 0.0))", "--config.model.vision.batch_norm=frozen"]
FLAGS += ["--config.model.llm.num_layers=1", "--config.model.vision.form=folded"]
FLAGS += ["--config.data.groups=2", "--config.data.rows_per_group=1", "--config.mesh=(1, 1, 1, 1)"]


ADAPTERS = (("lora/.*", 1e-3, 0.0), (".*", 0.0, 0.0))


def config_of(**overrides):
    c = small_config("", **ONE_STAGE, **overrides)
    c.model.vision.form, c.model.vision.batch_norm, c.mesh = "folded", "frozen", (1, 1, 1, 1)
    c.data.groups, c.data.images_per_group, c.data.rows_per_group, c.data.row_length = 2, 2, 2, 12
    return c


def step_of(c):
    """(config, model, state, batch) of a small step."""
    mesh = stage.make_mesh(c, jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = models.build(**c.model.to_dict())
        state = stage.make_step(c, model, mesh, steps=10).make_state(jax.random.key(0), None)
        return c, model, state, step.random_batch(c, model, mesh)


@pytest.fixture(scope="module")
def made():
    return step_of(config_of())


def test_the_batch_is_full(made):
    c, model, _, batch = made
    assert model.tokens_per_image(8) == 4
    np.testing.assert_array_equal(batch.image_index[0, 0], [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1])
    assert batch.image_mask.all() and batch.loss_mask.all() and (batch.segment_ids == 1).all()
    assert batch.tokens.max() < c.model.llm.vocab_size and batch.images.std() > 60


def test_the_gradients_of_the_parts_are_those_of_the_whole(made):
    """The chain of the parts against jax.grad of the loss that the trainer minimises."""
    assert check_parts(*made) == {"vision", "projector", "llm"}


def test_the_gradients_of_the_parts_of_a_step_with_adapters_are_those_of_the_whole():
    c = config_of(
        lora__rank=2, lora__targets="(vision|projector|llm/layers)/.*", groups=ADAPTERS, model__llm__num_layers=1
    )
    c, model, state, batch = step_of(c)
    keys = iter(
        jax.random.split(jax.random.key(2), 100)
    )  # fresh adapters add nothing, and half of them has no gradient
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state.params["lora"])
    state = state.replace(params={**state.params, "lora": moved})
    assert check_parts(c, model, state, batch) == {"lora"}


def check_parts(c, model, state, batch):
    """Compares the gradients of the parts with those of the loss; returns the first names of their paths."""
    trainable, frozen = optim.split(state.params, c.groups)
    loss = losses.next_token(model)

    def whole(trainable):
        variables = lora.variables_of(optim.merge(trainable, frozen), state.batch_stats, lora_of(c))
        return loss.value(variables, batch, loss.size(batch), jax.random.key(0))[0]

    expected = jax.jit(jax.grad(whole))(trainable)
    encode = step.encoder(c, model)
    features = jax.jit(encode)(state, batch)
    language, cotangent = jax.jit(step.language_model_gradient(c, model, True))(state, batch, features)
    (vision,) = jax.jit(step.encoder_gradient(c, encode))(state, batch, cotangent)
    assert {path.removeprefix("lora/").partition("/")[0] for path in vision} == {"vision"}
    assert {*vision, *language} == {*expected}
    for path, gradient in {**vision, **language}.items():
        largest = float(jnp.abs(expected[path]).max())
        assert largest > 0
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-3, atol=1e-3 * largest, err_msg=path)
    return {path.partition("/")[0] for path in expected}


def test_the_loss_alone_has_the_gradients_of_cross_entropy(made):
    c, _, state, batch = made
    hidden = jax.random.normal(jax.random.key(1), (2, 2, 12, 32))
    table = state.params["llm"]["embedding"]

    def reference(hidden, table):
        probabilities = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.mean(jnp.take_along_axis(probabilities, batch.targets[..., None], -1))

    found = jax.jit(step.loss_gradient(c))(state, batch, hidden)
    for mine, theirs in zip(found, jax.grad(reference, (0, 1))(hidden, table), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)


def test_parts_are_differences_of_programs_turn_by_turn():
    times = {
        "whole": [30.0, 40.0], "encoder forward": [2.0, 3.0], "encoder both": [6.0, 8.0],
        "language model and loss": [5.0, 6.0], "loss": [1.0, 2.0], "optimizer": [4.0, 4.5],
    }  # fmt: skip
    assert step.parts(times, 2) == {
        "encoder forward": [4.0, 6.0], "encoder backward": [8.0, 10.0], "language model": [8.0, 8.0],
        "loss": [2.0, 4.0], "optimizer": [4.0, 4.5], "rest": [4.0, 7.5],
    }  # fmt: skip
    del times["encoder both"]  # frozen
    assert step.parts(times, 1)["rest"] == [30 - 2 - 4 - 1 - 4, 40 - 3 - 4 - 2 - 4.5]
    assert "encoder backward" not in step.parts(times, 1)


def test_flops_by_hand():
    vit = dict(
        family="vit", image_size=8, patch_size=4, width=8, num_layers=2, num_heads=2, mlp_dim=16, activation="gelu",
        cls_token=False, pre_norm=False,
    )  # fmt: skip
    llm = dict(vocab_size=32, width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
    model = models.build(vit, llm)
    trainable, _ = optim.split(kinds.abstract_variables(model)["params"], ((".*", 1.0, 0.0),))
    found = step.work_of(model, trainable, images=3, side=8, rows=2, row_length=4)
    patches = 2 * 3 * 4 * 8 * (3 * 16)  # 3 images of 4 patches; a multiply-add is 2
    block = 2 * 3 * 4 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 3 * 4 * 4 * 8  # q k v o, MLP; scores and mixed values
    # Features are those before the last of the 2 blocks. The patches have no gradient of their input.
    assert found["encoder forward"] == patches + block and found["encoder backward"] == patches + 2 * block
    projector = 2 * 3 * 4 * (8 * 8 + 8 * 8)
    layer = 2 * 8 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 2 * 2 * 2 * (4 * 5 / 2) * 8
    assert found["language model"] == 3 * (projector + layer)
    assert found["loss"] == 3 * 2 * 8 * 8 * 32
    kept, _ = optim.split(kinds.abstract_variables(model)["params"], (("vision/.*", 0, 0), (".*", 1.0, 0.0)))
    assert "encoder backward" not in step.work_of(model, kept, images=3, side=8, rows=2, row_length=4)


def test_the_command_runs_without_the_data_pipeline(tmp_path):
    code = f"import sys; sys.modules.update(dict.fromkeys({UNNEEDED})); from fastvlm_jax import cli; cli.main()"
    output = tmp_path / "step.json"
    command = [sys.executable, "-c", code, "bench", "step", f"--config={ROOT}/tests/helpers/small.py:none", *FLAGS]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [*command, "--config.accumulate=2", "--runs=2", "--warmup=1", f"--output={output}"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert [*found["parts"]] == [part for part in (*step.PARTS, "rest") if part != "encoder backward"] and found[
        "measured"
    ] is True
    assert [*found["compile_seconds"]] == [
        "whole", "encoder forward", "language model and loss", "loss", "optimizer",
    ]  # fmt: skip
    assert found["images/s"] == pytest.approx(2 / found["step"]["median"])
    assert found["tokens/s"] == pytest.approx(2 * 80 / found["step"]["median"])
    assert found["mfu"] is None and found["peak_bytes"] == found["program_bytes"] > 0 and found["against"] == []
    # Parameters and two moments, and gradients, in float32; a few counts beside.
    trainable = 4 * found["parameters"]["trainable"]
    assert found["gradient_bytes"] == trainable
    everything = 4 * sum(count for part, count in found["parameters"].items() if part != "trainable")
    assert found["state_bytes"] == pytest.approx(everything + 2 * trainable, abs=2500)
    resident = found["resident_bytes"]
    assert resident["most"] > resident["before"] + found["state_bytes"]
    assert found["batch"]["accumulate"] == 2
    told = (tmp_path / "step.md").read_text()
    assert told.strip() == done.stdout.strip() and "no MFU: the peak of this device is not known" in told
    assert (tmp_path / "step.svg").stat().st_size > 1000 and (tmp_path / "step.png").stat().st_size > 1000


def test_other_benchmarks_for_a_gpu_import_nothing_of_it_either():
    names = ["bench.attention", "bench.step_page", "preflight.gpu", "preflight.liveness"]
    code = f"import sys; sys.modules.update(dict.fromkeys({UNNEEDED})); import " + ", ".join(
        f"fastvlm_jax.{name}" for name in names
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_wrong_settings_are_one_line(monkeypatch, capsys):
    config = f"--config={ROOT}/tests/helpers/small.py:none"
    status, _, err = fastvlm(monkeypatch, capsys, "bench", "step", config, "--config.mesh=(1, 3, 1, 1)")
    assert status == 1 and err.count("\n") == 1 and "mesh=(1, 3, 1, 1): needs 3 devices" in err
    status, _, err = fastvlm(monkeypatch, capsys, "bench", "step", config, "--config.data.image_size=9")
    assert status == 1 and err.count("\n") == 1 and "must be a multiple of 8" in err
    status, _, err = fastvlm(monkeypatch, capsys, "bench", "step", config, "--config.data.images_per_group=0")
    assert status == 1 and err.count("\n") == 1 and "data.images_per_group=0: the encoder's parts need images" in err
    status, _, err = fastvlm(monkeypatch, capsys, "bench", "step", config, "--output=step.md")
    assert status == 2 and err.count("\n") == 1 and "--output=step.md must end in .json" in err
    status, _, err = fastvlm(monkeypatch, capsys, "bench", "step")
    assert status == 2 and "--config is missing" in err


def test_a_page_names_what_it_compares():
    spread = {"median": 0.2, "p10": 0.1, "p90": 0.3}
    found = {
        "stage_name": "s", "device": "NVIDIA X", "devices": 2, "dtype": "bfloat16", "versions": {"jax": "1"},
        "batch": {"groups": 2, "accumulate": 1}, "parameters": {"llm": 2e6}, "remat": {"vision": "none", "llm": "full"},
        "runs": 2, "warmup": 1, "step": spread, "flops": 2e12, "mfu": 0.25, "peak_flops": 4e13, "images/s": 1.0,
        "tokens/s": 10.0, "peak_bytes": 2**30, "peak_is": "here", "program_bytes": 2**31,
        "state_bytes": 2**29, "gradient_bytes": 2**28, "resident_bytes": {"before": 2**29, "most": 2**32},
        "compile_seconds": {"whole": 3.0},
        "parts": {"loss": {**spread, "flops": 1e12, "mfu": 0.5}, "rest": {"median": -0.01, "p10": -0.02, "p90": 0.0}},
        "against": [{"name": "transformers, eager", "step": {"median": 0.4}, "ratio": 0.5, "notes": ["x frozen"]}],
    }  # fmt: skip
    told = step_page.text(found)
    assert "measured on 2 x NVIDIA X: bfloat16, jax 1" in told
    assert "| loss | 200 | 100 | 300 | 1 | 50.0% |" in told and "| rest | -10 | -20 | 0 | - | - |" in told
    assert "MFU 25.0% of 40 TFLOP/s" in told
    assert "needs 2.00 GiB; state 0.50 GiB, all gradients 0.25 GiB; the process held 4.00 GiB at most" in told
    found["resident_bytes"] = {"before": None, "most": None}
    assert "all gradients 0.25 GiB\n" in step_page.text(found)
    assert "- transformers, eager: 400 ms a step; ours takes 0.50 times that; x frozen" in told
    assert step_page.bars(found)["parts, each alone"] == {"loss": 0.2, "rest": 0.0}


def test_attention_is_timed_without_a_gpu_too():
    forward, both = attention.measure(rows=1, length=16, runs=1)
    # 14 heads of 64: two products forward, each 2 x 64 for the 16 * 17 / 2 visible pairs.
    assert forward["flops"] == 14 * 2 * 2 * 64 * 136 and both["flops"] == 3.5 * forward["flops"]
    assert forward["cudnn"] is None and forward["plain"]["median"] > 0
    assert "| 16 | forward and backward |" in attention.text({"device": "this", "attention": [forward, both]})


def test_the_gradient_of_attention_is_that_of_jax():
    q, k = jnp.ones((1, 4, 1, 2, 8)), jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
    segments = jnp.ones((1, 4), jnp.int32)
    expected = jax.grad(lambda q, k, v: jnp.sum(plain(q, k, v, segments, segments) * q), (1, 2))(q, k, k)
    found = attention.forward_and_backward(plain, q, k, k, segments, q)
    np.testing.assert_allclose(found[2], expected[1], rtol=1e-5)
