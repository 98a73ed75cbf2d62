"""The model for lmms-eval: found by its registry, with the base class and the requests of the real lmms-eval."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib

import jax
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import linen as nn
from harness import ask
from paths import ROOT
from small import ONE_STAGE, small_config

from fastvlm_jax import convert, model_io
from fastvlm_jax.evaluate.benchmark import Row
from fastvlm_jax.generate import generate
from fastvlm_jax.lmms_eval.requests import Settings, prompt, read_batch_size, read_row, read_settings
from fastvlm_jax.models import fastvlm
from fastvlm_jax.processor import Processor

GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def picture(number, mode="RGB"):
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, len(mode)), np.uint8)
    return PIL.Image.fromarray(pixels, mode)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The folder of a tiny model whose answers differ from question to question."""
    folder = tmp_path_factory.mktemp("model")
    config = small_config("none", model__vision__batch_norm="frozen", **ONE_STAGE)
    config.model.llm.vocab_size, config.model.llm.context_length = tokenizer.vocab_size, 64
    model = fastvlm.build(**config.model.to_dict())
    variables = jax.jit(lambda: nn.unbox(fastvlm.init_variables(model, jax.random.key(3))))()
    layers = variables["params"]["llm"]["layers"]
    for name, factor in (("q", 5), ("k", 5), ("v", 20), ("o", 20)):
        layers[name]["kernel"] *= factor
    variables = jax.tree.map(np.asarray, variables)
    convert.write(folder / "m", "native", variables, config.model.to_dict(), Processor(tokenizer, "chatml", 8, 4), {})
    return folder / "m"


@pytest.mark.parametrize(
    "given, expected",
    [
        # lmms-eval's defaults: an answer of 1024 tokens, greedy; `until` is not applied, as in its LLaVA model.
        ({"until": ["\n\n"]}, Settings(1024)),
        (GREEDY, Settings(6)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, Settings(16)),
        # MM-Vet's: the temperature is for samplers.
        ({"max_new_tokens": 512, "temperature": 0.2, "top_p": None, "num_beams": 1, "do_sample": False}, Settings(512)),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "seed": 42}, Settings(1024, 0.7, 0.9, seed=42)),
        ({"temperature": 0.5, "top_k": 5, "repetition_penalty": None}, Settings(1024, 0.5, top_k=5)),
        ({"temperature": 0, "do_sample": True, "top_p": 0}, Settings(1024)),
        ({"repetition_penalty": 1.2}, Settings(1024, repetition_penalty=1.2)),
    ],
)  # fmt: skip
def test_generation_settings_are_read_and_stay_as_they_are(given, expected):
    before = dict(given)
    assert read_settings(given, "task") == expected and given == before


def test_beams_are_refused_and_unknown_settings_are_told(caplog):
    with pytest.raises(
        ValueError, match="task docvqa_val: num_beams=5 is not supported: give --gen_kwargs num_beams=1"
    ):
        read_settings({"num_beams": 5}, "docvqa_val")
    read_settings({"best_of": 3, "until": ["x"]}, "one_task")
    assert "task one_task: these generation settings are not known and not applied: best_of" in caplog.text


def test_the_default_batch_size_of_lmms_eval_takes_as_many_questions_as_fit():
    # Its default is the number 1; what is given on its command line is text.
    assert [read_batch_size(size, None) for size in (1, None, "auto", "auto:4", "1", "16", 16)] == [
        None, None, None, None, 1, 16, 16
    ]  # fmt: skip
    assert read_batch_size("auto", 32) == 32
    for size in ("0", "-1", "many", "1.5", 0):
        with pytest.raises(ValueError, match=f"--batch_size {size}: give a number from 1, or auto"):
            read_batch_size(size, None)


@pytest.mark.parametrize(
    "text, images, content",
    [
        # As in lmms-eval's LLaVA model: one mark an image, a space between them, a line break behind.
        ("what is it?", 1, (0, "\nwhat is it?")),
        ("same?", 3, (0, " ", 1, " ", 2, "\nsame?")),
        ("hello", 0, ("hello",)),
        ("a <image> in a text without images", 0, ("a <image> in a text without images",)),
        ("<image>\nwhat?", 1, (0, "\nwhat?")),
        ("is <image> like <image>?", 2, ("is ", 0, " like ", 1, "?")),
    ],
)
def test_images_stand_where_the_llava_model_of_lmms_eval_puts_them(text, images, content):
    row = read_row(text, "task/test/7", lambda: [picture(i) for i in range(images)])
    assert prompt(row) == (("user", content),)


def test_marks_without_their_images_and_videos_are_refused():
    row = read_row("<image> or <image>?", "task/test/7", lambda: [picture(0)])
    with pytest.raises(ValueError, match="its text has 2 <image> marks for 1 images"):
        prompt(row)
    with pytest.raises(
        ValueError, match="task/test/7 asks about an object of type str: this model reads images and text"
    ):
        read_row("what happens?", "task/test/7", lambda: ["film.mp4"])


def test_images_are_handed_on_without_loss_and_equal_ones_have_one_name():
    images = [picture(0), picture(0), picture(1, "RGBA"), picture(2).convert("P")]
    row: Row = read_row("?", "task/test/7", lambda: images)
    first, second, clear, colours = row.pictures
    assert first.name == second.name and len({first.name, clear.name, colours.name}) == 3
    for image, found in zip(images, row.pictures, strict=True):
        shown = PIL.Image.open(io.BytesIO(found.read()))
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        np.testing.assert_array_equal(shown.convert(mode), image.convert(mode))


def entry_points(folder):
    """Writes the entry points of pyproject.toml as an installation does, and returns the folder for sys.path."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = folder / "site/fastvlm_jax-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastvlm_jax\nVersion: 0.1.0\n")
    lines = [f"{name} = {value}\n" for name, value in named.items()]
    (info / "entry_points.txt").write_text("[lmms_eval.models]\n" + "".join(lines))
    return info.parent


ADAPTER = """
import base64, io, os, sys
import PIL.Image

def main(value):
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    sys.path.insert(0, value["site"])
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    resolved = MODEL_REGISTRY_V2.resolve("fastvlm_jax")
    found = get_model("fastvlm_jax")
    lm = found.create_from_arg_string(f"pretrained={value['model']},dtype=float32", {"batch_size": value["batch_size"]})
    rows = [[PIL.Image.open(io.BytesIO(base64.b64decode(image))) for image in images] for _, images, _ in value["rows"]]
    lm.task_dict = {"own": {"test": rows}}
    requests = [
        Instance("generate_until", (text, settings, lambda row: row, i, "own", "test"), i,
                 {"task": "own", "doc_id": i, "repeats": 1})
        for i, (text, _, settings) in enumerate(value["rows"])
    ]
    before = [dict(settings) for _, _, settings in value["rows"]]
    answers = lm.generate_until(requests)
    lm.clean()
    refused = []
    for method in (lm.loglikelihood, lm.generate_until_multi_round):
        try:
            method(requests)
        except NotImplementedError as error:
            refused.append(str(error))
    os.environ["WORLD_SIZE"] = "2"
    try:
        found.create_from_arg_string(f"pretrained={value['model']}")
    except ValueError as error:
        refused.append(str(error))
    return {
        "type": resolved.model_type, "base": issubclass(found, lmms), "rank": [lm.rank, lm.world_size],
        "answers": answers, "again": lm.generate_until(requests[1:2]), "refused": refused,
        "kept": before == [settings for _, _, settings in value["rows"]],
    }
"""
SAMPLED = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 3}
ROWS = [
    ("what is it?", [0], GREEDY),
    ("what color is the thing one two?", [1], GREEDY),
    ("green or blue?", [1, 2], SAMPLED),
    ("one <image> two <image> three?", [2, 0], GREEDY),
    ("hello assistant", [], GREEDY | {"max_new_tokens": 10**6}),
    ("is it red?", [0], GREEDY),
]


def test_lmms_eval_finds_the_model_and_gets_the_answers_of_generate_in_the_order_of_its_requests(folder, tmp_path):
    images = [picture(i) for i in range(3)]
    encoded = [base64.b64encode(png(image)).decode() for image in images]
    rows = [(text, [encoded[i] for i in numbers], settings) for text, numbers, settings in ROWS]
    value = {"site": str(entry_points(tmp_path)), "model": str(folder), "rows": rows, "batch_size": "2"}
    before = ("fastvlm_jax.model_io", "fastvlm_jax.evaluate.answers", "fastvlm_jax.generate")
    told = ask("lmms-eval-0.7.3", ADAPTER, value, before=before)
    assert (told["type"], told["base"], told["rank"], told["kept"]) == ("simple", True, [0, 1], True)
    likelihood, rounds, processes = told["refused"]
    assert "generate_until" in likelihood and "generate_until" in rounds and "in one process" in processes
    loaded = model_io.load(folder, "float32")
    contents = [
        (0, "\nwhat is it?"), (0, "\nwhat color is the thing one two?"), (0, " ", 1, "\ngreen or blue?"),
        ("one ", 0, " two ", 1, " three?"), ("hello assistant",), (0, "\nis it red?"),
    ]  # fmt: skip
    prompts, shown = [(("user", content),) for content in contents], [numbers for _, numbers, _ in ROWS]
    expected = generate(*loaded, images, prompts, shown, max_tokens=6)
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    expected[2:3] = generate(*loaded, images[1:], prompts[2:3], max_tokens=6, **sampling)
    assert len(set(expected)) == 6
    # One answer may be as long as the model's context allows, 64 tokens with its prompt.
    long = told["answers"].pop(4)
    assert long.startswith(expected.pop(4)) and len(long) > 20
    assert told["answers"] == expected and told["again"] == expected[1:2]


YAML = """task: own_task
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function own_task.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
VISUALS = """import io
import PIL.Image

def visuals(row):
    return [PIL.Image.open(io.BytesIO(row["image"])).convert("RGB")]
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_a_run_of_lmms_eval_gives_the_answers_of_generate(folder, tmp_path):
    task = tmp_path / "task"
    task.mkdir()
    questions = [f"what is {name} {n}?" for name in ("red", "green", "blue", "it") for n in ("one", "two", "three")]
    images = [png(picture(i % 5)) for i in range(len(questions))]
    pq.write_table(pa.table({"image": images, "question": questions, "answer": ["red"] * 12}), task / "test.parquet")
    (task / "own_task.yaml").write_text(YAML.format(data=task / "test.parquet"))
    (task / "own_task.py").write_text(VISUALS)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    path = os.pathsep.join([str(ROOT), str(entry_points(tmp_path)), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "fastvlm_jax", "--tasks", "own_task", "--log_samples",
        f"--model_args=pretrained={folder},dtype=float32", f"--include_path={task}", f"--output_path={tmp_path}/out",
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | offline | {"PYTHONPATH": path}, capture_output=True, text=True)
    # lmms-eval writes an error to its log, and ends with status 0.
    samples = list((tmp_path / "out").rglob("*_samples_own_task.jsonl"))
    assert len(samples) == 1, (done.stdout + done.stderr)[-3000:]
    told = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, samples[0].read_text().splitlines())}
    model, variables, processor = model_io.load(folder, "float32")
    prompts = [(("user", (0, f"\n{question}")),) for question in questions]
    expected = generate(model, variables, processor, images, prompts, max_tokens=6)
    assert [told[i] for i in range(12)] == expected and len(set(expected)) > 3
