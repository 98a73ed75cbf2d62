"""Adapters and the base that they name: where it is looked for, what it may not be, and how both are added up."""

import json
import pathlib

import numpy as np
import pytest

from fastvlm_jax import adapted, model_io
from fastvlm_jax.loaded import Adapters
from fastvlm_jax.models.lora import Lora, problem


def peft_folder(folder, base):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": base})
    )
    return str(folder)


@pytest.mark.parametrize(
    "name", ["me@home/run", "lr=1/run", "me@home/run@best", "vision=lr=1/run,llm=me@home/run@best"]
)
def test_a_base_is_found_under_any_name(tmp_path, monkeypatch, name):
    for folder in ("me@home/run", "lr=1/run"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert adapted.base_of("adapters", name) == name


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "x" * 5000, "a\0b", "vision=/none,llm=/none"])
def test_a_name_that_no_place_can_have_is_asked_for_in_one_line(tmp_path, name):
    folder = peft_folder(tmp_path / "adapters", name)
    with pytest.raises(ValueError, match=r"which is not there: give the model too, as base=MODEL,lora="):
        model_io.read(folder)


def test_adapters_that_name_themselves_as_their_base_are_refused(tmp_path):
    one = peft_folder(tmp_path / "one", str(tmp_path / "two"))
    two = peft_folder(tmp_path / "two", one)
    itself = peft_folder(tmp_path / "itself", f"base={tmp_path / 'itself'},lora={two}")
    for folder in (one, itself, f"vision={one},llm={two}"):
        with pytest.raises(ValueError, match="names itself as the model that it adapts: give the model as base=MODEL"):
            model_io.read(folder)


@pytest.mark.parametrize("targets", ["(", "a{99999999999}", "(" * 5000, None])
def test_a_pattern_that_cannot_be_compiled_is_named(targets):
    assert problem(Lora(2, targets=targets)).startswith("targets=")


@pytest.mark.parametrize("alpha", [10**400, float("inf"), 0, True])
def test_an_alpha_that_is_no_factor_is_named(tmp_path, alpha):
    assert problem(Lora(2, alpha=alpha)).startswith("alpha=")
    file = pathlib.Path(peft_folder(tmp_path / "adapters", "base")) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": alpha}))
    with pytest.raises(ValueError, match=r"lora_alpha is .*, it must be a positive number up to 1e\+09"):
        model_io.read(file.parent)


def test_a_sum_has_the_same_bits_whatever_part_of_it_is_read():
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.normal(size=size).astype(np.float32) for size in ((3, 301, 203), (3, 301, 64), (3, 64, 203)))
    adapters = Adapters(Lora(64, alpha=7.0), {"llm": {"kernel": {"a": a, "b": b}}}, "base")
    leaf = adapted._joined("adapters", "llm/kernel", kernel, adapters, np.dtype(np.float32), None)
    whole = leaf[:]
    exact = kernel + np.einsum("lir,lro->lio", a.astype(np.float64), b.astype(np.float64)) * (7.0 / 64)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, exact, rtol=1e-6, atol=1e-6)
    for index in np.ndindex(3, 3, 3):
        cut = tuple(slice(size * i // 3, size * (i + 1) // 3) for i, size in zip(index, whole.shape, strict=True))
        assert np.array_equal(leaf[cut], whole[cut])
