"""Tests of generation_config.json: end ids, sampling as transformers understands it, and settings that are named."""

import json

import pytest

from fastvlm_jax.text.generation_config import GenerationConfig, read_generation_config

QWEN2 = {  # of Qwen2-7B-Instruct
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


@pytest.mark.parametrize("found, ids", [([151645, 151643], (151645, 151643)), (2, (2,)), (None, ()), ([], ())])
def test_one_end_id_or_a_list_of_them_is_read(found, ids):
    assert GenerationConfig({"eos_token_id": found}).end_ids == ids


def test_sampling_of_qwen2_is_read():
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert GenerationConfig(QWEN2).sampling == expected


@pytest.mark.parametrize(
    "settings, temperature, top_k",
    [
        ({"temperature": 0.9, "top_k": 5}, 0.0, 0),  # LLaVA-1.5's file has a temperature, but no do_sample
        ({"do_sample": False, "temperature": 0.9}, 0.0, 0),
        ({"do_sample": True}, 1.0, 50),
        ({"do_sample": True, "top_k": None, "temperature": None}, 1.0, 50),
        ({"do_sample": True, "top_k": 0}, 1.0, 0),
    ],
)
def test_defaults_are_those_of_transformers(settings, temperature, top_k):
    sampling = GenerationConfig(settings).sampling
    assert (sampling["temperature"], sampling["top_k"], sampling["top_p"]) == (temperature, top_k, 1.0)


def test_settings_that_would_change_answers_are_named_once_and_in_one_line(tmp_path, caplog):
    unknown = {"no_repeat_ngram_size": 3, "min_p": 0.1, "num_beams": 4, "suppress_tokens": [7], "presence_penalty": 0.5}
    neutral = {"num_beam_groups": 1, "typical_p": 1.0, "min_length": 0, "bad_words_ids": None, "use_cache": True}
    (tmp_path / "generation_config.json").write_text(json.dumps({**QWEN2, **unknown, **neutral}))
    assert read_generation_config(tmp_path).settings["min_p"] == 0.1
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'generation_config.json'}: not computed here, so answers may differ: no_repeat_ngram_size=3, "
        "min_p=0.1, num_beams=4, suppress_tokens=[7], presence_penalty=0.5"
    )


@pytest.mark.parametrize("config", [{"eos_token_id": [5, 6]}, {"text_config": {"eos_token_id": [5, 6]}}])
def test_without_the_file_the_end_ids_are_those_of_config_json(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, **config}))
    assert read_generation_config(tmp_path).end_ids == (5, 6)


def test_a_folder_without_the_file_has_no_settings(tmp_path):
    assert read_generation_config(tmp_path) is None


@pytest.mark.parametrize("found", ["2", [True], [2, -1], 1.5, {"a": 1}])
def test_end_ids_of_another_kind_are_refused_by_name(found, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is .* it must be an id or a list of"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_p": 1.5}, {"top_k": -1}, {"top_k": 2.5}, {"repetition_penalty": "1"}],
)
def test_sampling_out_of_range_is_refused_when_it_is_asked_for(settings):
    config = GenerationConfig({"do_sample": True, **settings}, "DIR/generation_config.json")
    (key,) = settings
    with pytest.raises(ValueError, match=rf"^DIR/generation_config\.json: {key} is [^\n]*$"):
        config.sampling  # noqa: B018
