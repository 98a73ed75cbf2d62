"""Which programs use the TPU kernels."""

import types

import jax
import pytest

from fastvlm_jax import sharding
from fastvlm_jax.kernels import choice
from fastvlm_jax.preflight import topology


def tpu_mesh():
    return sharding.make_mesh((1, -1, 1, 1), topology.devices(topology.parse("v5e:2x2")))


@pytest.mark.parametrize(
    "kernels, on_cpu, on_tpu", [("auto", False, True), ("none", False, False), ("interpret", True, True)]
)
def test_the_mesh_says_what_a_program_is_made_for(kernels, on_cpu, on_tpu):
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        assert choice.used(kernels) == on_cpu
    with jax.set_mesh(tpu_mesh()):
        assert choice.used(kernels) == on_tpu


def test_without_a_mesh_a_program_is_made_for_the_machine(monkeypatch):
    """As in `fastvlm generate` on a single chip."""
    assert not choice.used("auto")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5 lite")])
    assert choice.used("auto") and not choice.used("none")
