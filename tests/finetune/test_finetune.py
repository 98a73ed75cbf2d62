"""From a list and a folder of pictures to a tuned model, by one command; and what is refused before anything runs."""

import json

import numpy as np
import PIL.Image
import pytest
from random_model import random_variables

from fastvlm_jax import convert, model_io
from fastvlm_jax.finetune import run
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def model(json_file, tmp_path_factory):
    config = {
        "vision": dict(layers=(1, 1), embed_dims=(8, 16), mixers=("repmixer", "repmixer"), form="folded"),
        "llm": dict(vocab_size=512, width=32, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=64),
        "dtype": "float32",
    }
    _, variables = random_variables(config)
    folder = tmp_path_factory.mktemp("models") / "native"
    convert.write(folder, "native", variables, config, Processor(load_tokenizer(json_file), "chatml", 16, 4), {})
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty pictures of one colour each, and the list of questions about them."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for i in range(20):
        name = ("red", "blue")[i % 2]
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhich colour?"}, {"from": "gpt", "value": name}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def tuned(model, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("finetune") / "out"
    run.finetune(model, str(pictures / "mine.json"), output, lora=True, images=[str(pictures)])
    return output


def test_one_command_leads_to_a_tuned_model_with_scores_and_a_page(tuned, model):
    after = json.loads((tuned / "after" / "qa-own.json").read_text())
    assert after["n"] == json.loads((tuned / "before" / "qa-own.json").read_text())["n"] > 0
    assert (tuned / "report.html").stat().st_size > 1000 and (tuned / "data.html").exists()
    loaded = model_io.read(f"{tuned / 'run'}@best")
    assert loaded.adapters.lora.rank == 16 and loaded.adapters.base == model


def test_run_again_it_goes_on_and_repeats_neither_the_training_nor_the_questions_before(tuned, model, pictures, capfd):
    page, kept = tuned / "report.html", [*(tuned / "run" / "checkpoints").iterdir(), tuned / "before" / "qa-own.json"]
    times = {path: path.stat().st_mtime_ns for path in kept}
    page.unlink()  # as if it had been stopped before its last part
    run.finetune(model, str(pictures / "mine.json"), tuned, lora=True, images=[str(pictures)])
    assert page.exists() and {path: path.stat().st_mtime_ns for path in kept} == times
    shown = capfd.readouterr().out
    assert "$ fastvlm train" in shown and f"$ fastvlm evaluate --model={model}" not in shown


def test_the_settings_stay_as_they_are_and_another_model_is_refused(tuned, model, pictures, tmp_path):
    config = (tuned / "config.py").read_text()
    assert run.init(model, str(tuned / "data"), tuned, lora=True) == [
        f"{tuned / 'config.py'} is there and stays as it is"
    ]
    assert (tuned / "config.py").read_text() == config
    with pytest.raises(ValueError, match=r"was written for --lora=True: name another --output, or delete the file"):
        run.init(model, str(tuned / "data"), tuned, lora=False)


def test_sources_keep_their_meaning_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.absolute("runs/lr=1/a@best") == f"{tmp_path}/runs/lr=1/a@best"
    assert run.absolute("base=vision=a,llm=/b,lora=c") == f"base=vision={tmp_path}/a,llm=/b,lora={tmp_path}/c"
    assert run.absolute("gs://bucket/shards") == "gs://bucket/shards"


def test_a_config_of_ones_own_is_not_taken_for_that_of_init(model, tmp_path):
    (tmp_path / "config.py").write_text("")
    with pytest.raises(ValueError, match=r"config.py is not of `fastvlm init`, whose choice.json lies beside it"):
        run.init(model, "data", tmp_path, lora=False)


def test_a_part_that_fails_ends_the_command_with_its_name(model, tmp_path, capfd):
    with pytest.raises(run.Failed, match="`fastvlm data` ended with status 1; mend that, and the same command goes on"):
        run.finetune(model, str(tmp_path / "none.json"), tmp_path / "out", lora=False)
    assert "none.json" in capfd.readouterr().err
