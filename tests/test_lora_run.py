"""A run with adapters: what it trains, keeps and resumes, and how its model is read, merged and passed on."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import torch
from flax.traverse_util import flatten_dict
from meeting import adopt_and_meet
from safetensors.torch import load_file, save_file
from small import small_config
from torch_reference import transformers

from fastvlm_jax import checkpoint, convert, model_io
from fastvlm_jax.cli.convert import convert as command
from fastvlm_jax.config_values import lora_of
from fastvlm_jax.files import json_digest
from fastvlm_jax.train import train
from fastvlm_jax.train_state import model_variables

from peft import PeftModel  # isort: skip  after torch_reference, which makes torchvision importable

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


def adapted_config(data, base, **overrides):
    course = {"steps": 50, "checkpoint_every": 25, "data__groups": 2}
    return small_config(data, **{**LORA, "parent": str(base), **course, **ONE, **overrides})


@pytest.fixture(scope="module")
def adapted(easy_vqa, base, tmp_path_factory):
    """A workdir whose run has trained adapters of the base for fifty steps, and its last state."""
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


def test_a_checkpoint_holds_the_adapters_alone_and_names_the_digest_of_the_base(adapted, base):
    folder = checkpoint.find(adapted[0])[1]
    notes = checkpoint.read_notes(folder)
    names = {name.split(".")[1] for name in notes["digests"]["model"] if name.startswith("params.")}
    assert names == {"lora"}
    assert model_io.read(adapted[0]).lineage["base"] == {
        "model": str(base),
        "digest": json_digest(notes["base"]["digests"]),
    }
    assert "params.llm.layers.q.kernel" in notes["base"]["digests"]


def test_an_interrupted_run_ends_as_a_straight_one_bit_for_bit(easy_vqa, base, adapted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(adapted[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "50")
    resumed = run(adapted_config(easy_vqa, base, ema=0.5), workdir)
    jax.tree.map(np.testing.assert_array_equal, resumed, adapted[1])


def test_a_run_of_several_processes_reads_its_parent_before_they_meet(parent, adapted):
    adopt_and_meet(f"parent={parent}", f"parent={adapted[0]}")


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    index = np.full((1, 1, 12), -1, np.int32)
    index[..., 1:5] = range(4)
    return dict(
        images=rng.integers(0, 256, (1, 1, 16, 16, 3)).astype(np.uint8),
        tokens=rng.integers(0, 512, (1, 1, 12)).astype(np.int32),
        image_index=index,
        positions=np.arange(12, dtype=np.int32)[None, None],
        segment_ids=np.ones((1, 1, 12), np.int32),
    )


@pytest.fixture(scope="module")
def logits(adapted, inputs):
    """Of the model that was trained, its adapters apart from the kernels."""
    model, _, _ = model_io.load(adapted[0])
    variables = model_variables(adapted[1], lora_of(adapted_config("", "")))
    return jax.jit(lambda v: model.apply(v, **inputs))(variables)


def logits_of(source, inputs):
    model, variables, _ = model_io.load(source)
    return jax.jit(lambda v: model.apply(v, **inputs))(variables)


def test_the_model_that_is_read_has_the_adapters_in_its_kernels(adapted, base, inputs, logits):
    assert not np.allclose(logits_of(base, inputs), logits, atol=1e-2)
    np.testing.assert_allclose(logits_of(adapted[0], inputs), logits, atol=1e-5 * float(np.abs(logits).max()))


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_a_whole_model_in_any_layout_is_merged(adapted, inputs, logits, layout, tmp_path):
    command([*map(str, ["convert", "--source", adapted[0], "--target", tmp_path / "model", "--layout", layout])])
    found = logits_of(tmp_path / "model", inputs)
    np.testing.assert_allclose(found, logits, atol=1e-5 * float(np.abs(logits).max()))


@pytest.fixture(scope="module")
def peft_folder(adapted, tmp_path_factory):
    target = tmp_path_factory.mktemp("peft") / "adapters"
    command([*map(str, ["convert", "--source", adapted[0], "--target", target, "--layout", "peft"])])
    return target


def test_peft_loads_the_adapters_on_the_exported_model_and_computes_the_same(base, peft_folder, inputs, logits):
    reference = transformers.FastVlmForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(reference, peft_folder).eval()
    tokens = np.where(inputs["image_index"][0] < 0, inputs["tokens"][0], reference.config.image_token_index)
    pixels = torch.tensor(inputs["images"][0].transpose(0, 3, 1, 2) / np.float32(255))
    with torch.no_grad():
        found = adapted(input_ids=torch.tensor(tokens, dtype=torch.long), pixel_values=pixels).logits
    np.testing.assert_allclose(found, logits[0], atol=1e-5 * float(np.abs(logits).max()))


def test_a_peft_folder_that_peft_wrote_comes_back_bit_for_bit(base, peft_folder, inputs, logits, tmp_path):
    reference = transformers.FastVlmForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(reference, peft_folder).save_pretrained(tmp_path / "theirs")
    found = logits_of(f"base={base},lora={tmp_path / 'theirs'}", inputs)
    np.testing.assert_allclose(found, logits, atol=1e-5 * float(np.abs(logits).max()))
    command(
        [*map(str, ["convert", "--source", tmp_path / "theirs", "--target", tmp_path / "again", "--layout", "peft"])]
    )
    folders = (peft_folder, tmp_path / "theirs", tmp_path / "again")
    first, *others = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for tensors in others:
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in first)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4.0, str(base))


def test_a_peft_folder_has_the_image_size_that_its_adapters_were_trained_with(base, adapted, tmp_path):
    """Here and in transformers; a folder without settings of images has those of its base."""
    loaded = model_io.read(adapted[0])
    wide = dataclasses.replace(loaded.processor, image_size=32, tokens_per_image=16)
    args = (tmp_path / "wide", "peft", loaded.variables, loaded.config)
    convert.write(*args, loaded.processor, {}, adapters=loaded.adapters)
    convert.write(*args, wide, {}, adapters=loaded.adapters, overwrite=True)
    found = model_io.read(tmp_path / "wide").processor
    assert (found.image_size, found.tokens_per_image) == (32, 16)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "wide")
    text = theirs(images=PIL.Image.new("RGB", (40, 30)), text="<image>", return_tensors="pt")
    assert text["pixel_values"].shape[-2:] == (32, 32)
    assert int((text["input_ids"] == theirs.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 16
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "wide" / name).unlink()
    assert model_io.read(tmp_path / "wide").processor.image_size == model_io.read(base).processor.image_size == 16


def test_another_base_than_that_of_the_training_is_refused(easy_vqa, adapted, base, tmp_path):
    other = tmp_path / "other" / base.name  # a run takes it for its parent, moved
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.language_model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"llm/layers/up/kernel of its base .* is not what the adapters were trained on"
    ):
        model_io.load(f"base={other},lora={adapted[0]}")
    shutil.copytree(adapted[0], tmp_path / "run")
    with pytest.raises(ValueError, match="holds adapters of another model than the `parent` of this run is now"):
        run(adapted_config(easy_vqa, other, ema=0.5), tmp_path / "run")


def with_config(adapted, target, **changes):
    shutil.copytree(adapted[0], target)
    run = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**run, "config": {**run["config"], **changes}}))
    return target


def test_the_targets_of_a_workdir_are_those_that_were_saved_whatever_its_pattern_is(adapted, tmp_path):
    endless = dict(rank=2, alpha=4.0, targets="(?:[a-z/]|[a-z/]+)*!")  # matching it takes years
    found = model_io.read(with_config(adapted, tmp_path / "run", lora=endless)).adapters
    assert flatten_dict(found.params).keys() == flatten_dict(model_io.read(adapted[0]).adapters.params).keys()


def test_a_workdir_that_names_itself_or_nothing_as_its_parent_is_refused(adapted, tmp_path):
    with pytest.raises(ValueError, match="names itself as the model that it adapts"):
        model_io.read(with_config(adapted, tmp_path / "run", parent=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="does not say what it adapts: give the model too"):
        model_io.read(with_config(adapted, tmp_path / "other", parent=None))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(groups=((".*", 1e-3, 0.0),)), "groups train .*kernel, to which lora gives an adapter: set groups to "),
        (dict(groups=((".*", 0.0, 0.0),)), "groups freeze the adapter lora/"),
        (dict(parent=""), "lora adapts a trained model: name it with --config.parent=MODEL"),
        (dict(lora__targets="llm/layers/qq"), "lora.targets='llm/layers/qq' matches no dense kernel; there are "),
        (dict(lora__targets="("), "lora.targets='[(]' is no regex"),
        (dict(lora__rank=-1), "lora.rank=-1 must be a whole number from 1 to 4096"),
        (dict(lora__alpha=0.0), "lora.alpha=0.0 must be a positive number"),
        (
            dict(lora__dropout=0.1),
            r"lora.dropout=0.1 is not for vision/stage_1/.*: set it to 0, or leave out its target",
        ),
    ],
)
def test_settings_that_fit_no_adapters_are_refused_in_one_line(easy_vqa, base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(adapted_config(easy_vqa, base, **changes), tmp_path / "run", jax.devices()[:1])
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "config.json").exists()


def changed(peft_folder, target, key, value):
    shutil.copytree(peft_folder, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    return target


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "base_model_name_or_path",
            "apple/FastVLM-0.5B",
            "adapts apple/FastVLM-0.5B, which is not there: give the model",
        ),
        ("base_model_name_or_path", None, "does not say what it adapts: give the model too, as base=MODEL,lora="),
        ("use_dora", True, "use_dora is True, only False can be read: merge the adapters"),
        ("r", 3, "has shape"),
        ("r", -1, "r is -1, it must be a whole number from 1 to 4096"),
        ("lora_alpha", "x", "lora_alpha is 'x', it must be a positive number"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', whose adapters fit a changed base"),
        ("init_lora_weights", "lora_ga", "init_lora_weights is 'lora_ga', whose adapters fit a changed base"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern is"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens is"),
        ("base_model_name_or_path", "~nobody-of-this-name/x", "which is not there: give the model"),
    ],
)
def test_a_peft_folder_that_cannot_be_computed_is_refused_by_key(peft_folder, tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        model_io.read(changed(peft_folder, tmp_path / "adapters", key, value))


def test_tensors_of_other_modules_and_pickles_are_refused(peft_folder, tmp_path):
    shutil.copytree(peft_folder, tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.nothing.lora_A.weight": torch.zeros(2, 4)}, file)
    with pytest.raises(ValueError, match=r"tensor base_model.model.model.nothing.lora_A.weight adapts no dense layer"):
        model_io.read(tmp_path / "adapters")
    save_file({**tensors, "base_model.model.lm_head.modules_to_save.weight": torch.zeros(2, 4)}, file)
    with pytest.raises(ValueError, match=r"lm_head\.modules_to_save\.weight is not of a LoRA adapter"):
        model_io.read(tmp_path / "adapters")
    some = {n: x for n, x in tensors.items() if "layers.1.mlp" not in n}
    save_file(some, file)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj has no adapter and other layers have one"):
        model_io.read(tmp_path / "adapters")
    file.unlink()
    (tmp_path / "adapters" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a pickle"):
        model_io.read(tmp_path / "adapters")


def test_a_base_beside_a_whole_model_is_refused(base):
    with pytest.raises(ValueError, match="holds no adapters but a whole model: leave out base="):
        model_io.read(f"base={base},lora={base}")
