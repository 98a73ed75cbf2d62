"""A run with adapters: what it trains, keeps and resumes, and how its model is read, merged and passed on."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small import small_config

from fastvlm_jax import checkpoint, convert, generate, model_io
from fastvlm_jax.train import train

LORA = dict(
    lora__rank=2, lora__alpha=4.0, lora__targets="(llm/layers/.*|projector/.*|vision/stage_1/.*)",
    groups=(("lora/.*", 1e-2, 0.0), (".*", 0.0, 0.0)), model__vision__batch_norm="frozen",
    model__vision__form="folded",
)  # fmt: skip
ONE = dict(mesh=(1, 1, 1, 1), model__vision__mixers=("repmixer", "repmixer"))  # stages that transformers has


def run(config, workdir, devices=1):
    return jax.tree.map(np.asarray, train(config, pathlib.Path(workdir), jax.devices()[:devices]))


@pytest.fixture(scope="module")
def parent(easy_vqa, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "parent"
    run(small_config(easy_vqa, steps=1, **ONE), workdir)
    return workdir


@pytest.fixture(scope="module")
def base(parent, tmp_path_factory):
    """The parent as transformers has it."""
    target, loaded = tmp_path_factory.mktemp("base") / "hf", model_io.read(parent)
    convert.write(target, "hf", loaded.variables, loaded.config, loaded.processor, {}, dtype="bfloat16")
    return target


def adapted_config(data, parent, **overrides):
    return small_config(data, **{**LORA, "parent": str(parent), "steps": 4, "checkpoint_every": 2, **ONE, **overrides})


@pytest.fixture(scope="module")
def adapted(easy_vqa, base, tmp_path_factory):
    """A workdir whose run has trained adapters of the base for four steps, and its last state."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    return workdir, run(adapted_config(easy_vqa, base, ema=0.5), workdir)


def test_frozen_parameters_stay_bit_for_bit_and_adapters_move(adapted, base):
    before = {p: np.asarray(x) for p, x in flatten_dict(model_io.read(base).variables["params"], sep="/").items()}
    after = flatten_dict(adapted[1].params, sep="/")
    for path, x in before.items():
        assert np.array_equal(x, after[path].astype(x.dtype)), path
        assert after[path].dtype == (x.dtype if path.endswith(("/kernel", "/embedding")) else np.float32)
    moved = [path for path in after if path.startswith("lora/")]
    assert len(moved) == 2 * (7 + 2 + 2) and all(np.any(after[path]) for path in moved)


def test_a_checkpoint_holds_the_adapters_alone_and_names_the_digest_of_the_base(adapted):
    folder = checkpoint.find(adapted[0])[1]
    notes = checkpoint.read_notes(folder)
    names = {name.split(".")[1] for name in notes["digests"]["model"] if name.startswith("params.")}
    assert names == {"lora"}
    assert "params.llm.layers.q.kernel" in notes["base"]["digests"]


def test_an_interrupted_run_ends_as_a_straight_one_bit_for_bit(easy_vqa, base, adapted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(adapted[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    resumed = run(adapted_config(easy_vqa, base, ema=0.5), workdir)
    jax.tree.map(np.testing.assert_array_equal, resumed, adapted[1])
