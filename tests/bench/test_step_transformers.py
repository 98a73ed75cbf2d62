"""The step of transformers that `fastvlm bench step --against transformers` times: it trains what the config trains."""

import math
import os
import subprocess
import sys

import jax
import pytest
import torch
from paths import ROOT

from fastvlm_jax import stage
from fastvlm_jax.bench import step, step_transformers
from fastvlm_jax.config import get_base
from fastvlm_jax.models import fastvlm as models


def made(**overrides):
    """(config, model, batch) of the tiny model at 64 px with a frozen encoder."""
    c = get_base("tiny")
    c.groups = (("vision/.*", 0.0, 0.0), (".*", 1e-3, 0.0))
    c.data.image_size, c.data.groups, c.data.images_per_group, c.data.row_length = 64, 2, 2, 8
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    model = models.build(**c.model.to_dict())
    return c, model, step.random_batch(c, model, stage.make_mesh(c, jax.devices()[:1]))


def test_a_step_trains_all_but_the_frozen_encoder(monkeypatch):
    built = []
    build = step_transformers.transformers_model.build
    monkeypatch.setattr(
        step_transformers.transformers_model, "build", lambda model: built.append(build(model)) or built[0]
    )
    (name, other), *others = step_transformers.prepare(*made()).items()
    assert name == "transformers, eager" and others == []  # torch.compile is for GPUs
    before = {name: parameter.detach().clone() for name, parameter in built[0].named_parameters()}
    losses = [other.call() for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(512), abs=1.5) and losses[2] < losses[0]  # random words, learnt by heart
    changed = {name for name, parameter in built[0].named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if name not in changed} == {
        n for n in before if n.startswith("model.vision_tower.")
    }
    assert other.facts["notes"] == ["vision frozen"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data__rows_per_group": 2}, "encodes the images of every row: set --config.data.rows_per_group=1"),
        ({"data__row_length": 1}, r"the 2 image tokens of its group: set --config.data.row_length=2 or more"),
        ({"accumulate": 2}, "takes the whole batch at once: set --config.accumulate=1"),
        ({"model__vision__batch_norm": "train"}, "set --config.model.vision.batch_norm=frozen"),
        ({"groups": (("llm/layers/.*", 1e-3, 0.0), (".*", 0.0, 0.0))}, "groups train llm in part"),
    ],
)
def test_what_transformers_cannot_do_is_told_with_the_mend(overrides, message):
    with pytest.raises(ValueError, match=f"^--against transformers.*{message}"):
        step_transformers.prepare(*made(**overrides))


def test_a_torchvision_that_fits_declares_its_operators_itself(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    asked = (
        "from fastvlm_jax.bench.transformers_model import import_transformers\n"
        "print(import_transformers().__name__, __import__('torchvision').library.ns)"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", asked], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "transformers torchvision\n", done.stderr
