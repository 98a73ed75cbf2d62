"""Tests the estimated time to the first token with the real TPU compiler, against what no chip can be faster than."""

import importlib.util

import pytest

from fastvlm_jax.bench.first_token import Question
from fastvlm_jax.chips import GENERATIONS
from fastvlm_jax.models import flops
from fastvlm_jax.models.fastvlm import build
from fastvlm_jax.preflight.ttft import estimate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
VISION = dict(layers=(1,), embed_dims=(32,), mixers=("repmixer",), form="folded")
LLM = dict(vocab_size=4096, width=256, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=1024)


def test_the_parts_of_one_chip_are_estimated_and_none_is_faster_than_the_chip(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    model = build(vision=VISION, llm=LLM, dtype="bfloat16")
    point = estimate(model, "v5p:2x2x1", Question(64, None, prompt_tokens=60))
    assert point["measured"] is False and point["device"] == "one chip of v5p:2x2x1" and point["user_ttft"] is None
    assert point["parts"].keys() == {"encoder", "projector", "prefill", "next_token", "prefill_image", "fused"}
    seconds = {name: part["median"] for name, part in point["parts"].items()}
    assert seconds["fused"] == seconds["encoder"] + seconds["projector"] + seconds["prefill"]
    assert point["paper_ttft"] == seconds["encoder"] + seconds["prefill_image"]
    chip, work = GENERATIONS["v5p"], flops.forward_flops(model, 1, 64, 64, 1, 256 + 60)
    assert work["vision"] / chip.flops < seconds["encoder"] < 1e-3
    assert work["llm"] / chip.flops < seconds["prefill"] < 1e-3
    # A further token reads each weight of the language model, two bytes, once.
    assert 2 * point["parameters"]["llm"] / chip.hbm_bandwidth < seconds["next_token"] < 1e-3
    assert seconds["prefill_image"] < 1.05 * seconds["prefill"]
    assert 2 * point["parameters"]["llm"] < point["peak_bytes"] < chip.hbm
