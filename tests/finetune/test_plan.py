"""What a fine-tuning run is given: sizes, batches, rates, adapters and memory, by facts of the data."""

import runpy

import pytest
from random_model import random_variables

from fastvlm_jax import convert
from fastvlm_jax.finetune import config_file, plan
from fastvlm_jax.finetune.facts import Facts
from fastvlm_jax.preflight import gpu
from fastvlm_jax.preflight.gpu import Gpus
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

FACTS = Facts(
    records=400, unusable=3, pictures=400, most_pictures=1, text_only=0.0, side=100, text=36.0, longest=60, words=1.0
)  # fmt: skip
LARGE = Gpus("gpu:80GB", 1, 80e9)
TRACED = {}  # (config, model) -> what the traced step holds


@pytest.fixture(autouse=True)
def equal_steps_are_traced_once(monkeypatch):
    """Keeps what was found for a step: tracing is most of what these tests take."""
    traced = gpu.traced

    def once(config, model):
        key = config.to_json(), model
        if key not in TRACED:
            TRACED[key] = traced(config, model)
        return TRACED[key]

    monkeypatch.setattr(gpu, "traced", once)


@pytest.fixture(scope="module")
def model(json_file, tmp_path_factory):
    """A model of 16 features for an image of 64 px, whose decoder has 224 channels and reads 512 tokens."""
    config = {
        "vision": dict(layers=(1, 1), embed_dims=(8, 16), mixers=("repmixer", "repmixer"), form="folded"),
        "llm": dict(
            vocab_size=512, width=224, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=32, context_length=512
        ),
        "dtype": "float32",
    }
    _, variables = random_variables(config)
    processor = Processor(load_tokenizer(json_file), "chatml", 64, 64)
    folder = tmp_path_factory.mktemp("models") / "native"
    convert.write(folder, "native", variables, config, processor, {})
    return str(folder)


def values(model, facts=FACTS, held_out=40, lora=False, devices=LARGE):
    made = plan.choose(model, "/data", facts, held_out, lora=lora, devices=devices)
    return {choice.key: choice.value for choice in made.choices}, made


def test_settings_follow_the_data(model):
    found, made = values(model)
    # 8 px a feature: 64 features an image. Four records of 64 + 36 tokens fill a row of 448.
    assert (found["data.image_size"], found["data.groups"], found["data.images_per_group"]) == (64, 4, 4)
    assert found["data.row_length"] == 448
    # 25 batches of 16 an epoch: four epochs for 100 steps. (896 / 224)^2 = 16 times the rate of 2e-5.
    assert found["epochs"] == 4.0 and found["groups"] == ((".*", 3e-4, 0.0),)
    assert made.metric == "exact" and found["evaluate"] == (("qa", "", 50),)
    assert found["keep_best"] == "validation/loss"
    assert made.config.parent == model and made.config.data.path == "/data"
    assert any("3 records cannot be used" in remark for remark in made.remarks)


def test_small_pictures_take_fewer_tokens_but_never_less_than_half_the_models_size(model):
    assert values(model, FACTS._replace(side=20))[0]["data.image_size"] == 32
    assert values(model, FACTS._replace(side=33))[0]["data.image_size"] == 40
    assert values(model, FACTS._replace(side=5000))[0]["data.image_size"] == 64
    assert values(model, FACTS._replace(pictures=0, most_pictures=0, side=0))[0]["data.image_size"] == 64


def test_adapters_learn_at_ten_times_the_rate_and_all_else_is_frozen(model):
    found, made = values(model, lora=True)
    assert found["groups"] == (("lora/.*", 3e-3, 0.0), (".*", 0.0, 0.0))
    assert (found["lora.rank"], found["lora.alpha"]) == (16, 32.0)
    assert made.config.lora.targets == "(llm/layers|projector)/.*"


@pytest.mark.parametrize("words, metric", [(1, "exact"), (3, "exact"), (3.5, "anls"), (10, "anls"), (11, "f1")])
def test_the_metric_fits_the_length_of_the_answers(model, words, metric):
    found, made = values(model, FACTS._replace(words=words))
    assert made.metric == metric and ("evaluate" in found) == (metric == "exact")


def test_few_records_have_smaller_batches_and_more_epochs(model):
    found, _ = values(model, FACTS._replace(records=40, pictures=40), held_out=0)
    assert found["data.groups"] * found["data.images_per_group"] == 8
    assert found["epochs"] == 20.0  # 5 steps an epoch
    assert found["checkpoint_every"] == 13  # an eighth of 100 steps
    assert not {"keep_best", "evaluate", "eval_every"} & found.keys()


def test_groups_are_spread_over_all_devices(model):
    found, made = values(model, devices=Gpus("gpu:8x80GB", 8, 80e9))
    assert (found["data.groups"], found["data.images_per_group"]) == (8, 2)
    lighter = [choice.key for more in plan._lighter(made.config, False, 8) for choice in more]
    assert "accumulate" not in lighter and "moment_dtype" in lighter  # a group on each device has no parts


def test_the_dtype_is_that_of_the_devices_that_are_asked_for(model):
    assert "model.dtype" not in values(model)[0]
    assert values(model, devices=Gpus("cpu:80GB", 1, 80e9))[0]["model.dtype"] == "float32"


def test_records_without_a_picture_are_told(model):
    _, made = values(model, FACTS._replace(pictures=300, text_only=0.25))
    assert made.choices[1].why == "400 records with 300 pictures, 25% of them without any"


def test_with_less_memory_more_is_computed_again_and_too_little_is_refused(model):
    whole, made = values(model)
    needed = gpu.margin(LARGE) * sum(gpu.memory(made.config, LARGE)[0].values())
    assert whole["model.llm.remat"] == "none"
    enough, _ = values(model, devices=Gpus("gpu", 1, 1.01 * needed))
    less, _ = values(model, devices=Gpus("gpu", 1, 0.99 * needed))
    assert enough == whole and "model.llm.remat" not in less
    with pytest.raises(ValueError, match=r"GiB by arithmetic at its least, and a device here has .*: give --lora"):
        values(model, devices=Gpus("gpu", 1, 1e6))


def test_a_record_with_more_pictures_than_the_model_reads_is_refused(model):
    with pytest.raises(ValueError, match="a record has 8 pictures, 64 tokens each, and the model reads 512 tokens"):
        values(model, FACTS._replace(most_pictures=8))


def test_the_config_file_gives_the_settings_that_were_chosen(model, tmp_path):
    for lora in (False, True):
        _, made = values(model, lora=lora)
        file = tmp_path / "config.py"
        file.write_text(config_file.text(made, model, "fastvlm train"))
        assert runpy.run_path(str(file))["get_config"]() == made.config
        assert max(map(len, file.read_text().splitlines())) <= 120


def test_any_path_stands_in_the_file_as_it_is(model, tmp_path):
    _, made = values(model)
    odd = made.choices[1]._replace(value='/d/\\N"""😀')
    file, command = tmp_path / "config.py", 'fastvlm train --workdir=\'/d/\\N"""😀\''
    file.write_text(config_file.text(made._replace(choices=[odd]), model, command))
    ran = runpy.run_path(str(file))
    assert ran["get_config"]().data.path == odd.value and command in ran["__doc__"]


def test_models_that_cannot_be_tuned_are_refused(model, json_file, tmp_path):
    config = {"llm": dict(vocab_size=512, width=32, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=32)}
    _, variables = random_variables({**config, "dtype": "float32"})
    processor = Processor(load_tokenizer(json_file), "chatml", 0, 0)
    convert.write(tmp_path / "llm", "native", variables, config, processor, {})
    with pytest.raises(ValueError, match="has no vision: give a whole FastVLM"):
        values(str(tmp_path / "llm"))
