"""Tests `fastvlm bench ttft` on a model of one block: what its parts compute, what its rows hold, what it refuses."""

import json
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import fastvlm
from paths import HELPERS, ROOT
from random_model import random_variables

from fastvlm_jax import convert
from fastvlm_jax.bench import clock, first_token, ttft, ttft_docs, ttft_model, ttft_page
from fastvlm_jax.bench.first_token import Question, read_sizes
from fastvlm_jax.models.fastvlm import build
from fastvlm_jax.models.kinds import boxed_variables
from fastvlm_jax.models.names import encoder_name, llm_name
from fastvlm_jax.models.sizes import LLM_SIZES, VISION_SIZES

VISION = dict(layers=(1,), embed_dims=(8,), mixers=("repmixer",), form="folded")
LLM = dict(vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=32, rope_theta=1e4)
CONFIG = """
import sys
sys.path.insert(0, {helpers!r})
from small import ONE_STAGE, small_config
def get_config():
    return small_config("", **ONE_STAGE)
"""
TILES = Question(8, (1, 2), prompt_tokens=5, batch=2)  # 3 squares of 4 tokens a prompt


@pytest.fixture(scope="module")
def model():
    return random_variables({"vision": VISION, "llm": LLM})


@pytest.fixture(scope="module")
def parts(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ttft, "PHOTO", (64, 48))
        yield ttft.prepare(*model, None, TILES)


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "small_model.py"
    file.write_text(CONFIG.format(helpers=str(HELPERS)))
    return file


def test_the_parts_compute_the_first_and_the_second_token_of_a_full_forward_pass(model, parts):
    model, variables = model
    pixels = ttft.decode_resize(ttft.sample_jpeg((64, 48)), None, TILES)
    assert pixels.shape == (1, 6, 8, 8, 3) and np.array_equal(pixels[:, :3], pixels[:, 3:])
    batch = first_token.make_batch(model, TILES, pixels)
    assert (batch.segment_ids.sum(-1) == 17).all() and batch.tokens.shape == (1, 2, 32)
    assert batch.image_index[0, :, 11].tolist() == [11, 23] and (batch.image_index[0, :, 12:] == -1).all()
    fields = ("images", "tokens", "image_index", "positions", "segment_ids", "image_mask")
    given = {name: getattr(batch, name)[..., :17] if name in fields[1:5] else getattr(batch, name) for name in fields}

    def following(given):
        return np.argmax(jax.jit(model.apply)(variables, **given)[0, :, -1], -1)

    first = following(given)
    assert np.array_equal(parts.calls["fused"](), first)
    assert np.array_equal(parts.calls["prefill"]()[0], first)
    longer = {"tokens": first, "image_index": (-1, -1), "positions": (17, 17), "segment_ids": (1, 1)}
    given |= {name: np.append(given[name], np.reshape(new, (1, 2, 1)), axis=2) for name, new in longer.items()}
    assert np.array_equal(parts.calls["next_token"](), following(given))
    step, (ids_B, cache) = parts.programs["next_token"], parts.calls["prefill"]()
    _, after = step(variables, ids_B, jnp.full(2, 17, jnp.int32), cache)
    assert int(after.length) == 32  # as before the step, so that the same step can run again


def test_the_prefill_for_the_papers_time_reads_the_image_tokens_alone(model):
    alone = first_token.make_batch(model[0], TILES._replace(prompt_tokens=0), np.zeros((1, 6, 8, 8, 3), np.uint8))
    assert int(alone.segment_ids.sum()) == 2 * 12 and (alone.image_index[alone.segment_ids > 0] >= 0).all()


def test_a_slowed_part_shows_in_its_own_row_alone(model, parts):
    projector = parts.calls["projector"]
    slowed = {**parts.calls, "projector": lambda: (time.sleep(0.05), projector())[1]}
    times = clock.take_turns(slowed, runs=5, warmup=1)
    assert min(times["projector"]) >= 0.05
    assert [name for name, runs in times.items() if min(runs) >= 0.05] == ["projector"]


def test_nothing_is_compiled_while_the_clock_runs(parts):
    compiled, running = [], False

    def listen(event, seconds, **_):
        if running and "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    running = True
    jax.jit(lambda x: x + 1.5)(jnp.ones(3))  # the listener hears
    assert compiled
    compiled.clear()
    clock.take_turns(parts.calls, runs=1, warmup=0)
    running = False
    assert compiled == []
    assert parts.compile_seconds.keys() == parts.programs.keys() == parts.calls.keys() - {"decode_resize", "copy"}


def test_the_two_times_to_the_first_token_are_sums_of_their_own_parts(model, parts):
    own = {"copy": 1, "encoder": 10, "projector": 100, "prefill": 1000, "next_token": 5, "prefill_image": 200}
    times = {name: [float(x), float(x), float(x)] for name, x in own.items()}
    times |= {"decode_resize": [1.0, 5.0, 2.0], "fused": [100.0, 1.0, 50.0]}
    point = ttft.to_point(*model, TILES, parts, times)
    assert point["paper_ttft"] == 210.0
    assert point["user_ttft"] == 52.0  # the median of the runs' sums, not the sum of the medians
    assert point["parts"]["decode_resize"] == pytest.approx({"median": 2.0, "p10": 1.2, "p90": 4.4})
    assert (point["image_tokens"], point["grid"], point["measured"], point["attention"]) == (12, [1, 2], True, "plain")
    assert point["parameters"]["projector"] == 16 * 16 + 16 + 16 * 16 + 16
    json.dumps(point)


def test_a_config_is_timed_as_it_is_used_and_written_as_json_table_and_picture(
    monkeypatch, capsys, config_file, tmp_path
):
    monkeypatch.setattr(ttft, "PHOTO", (64, 48))
    output = tmp_path / "out" / "ttft.json"
    flags = ("--image_size=8,8:1x2", "--runs=2", "--warmup=1", "--prompt_tokens=3", "--dtype=bfloat16")
    status, out, err = fastvlm(
        monkeypatch, capsys, "bench", "ttft", f"--config={config_file}", *flags, f"--output={output}"
    )
    assert (status, err) == (0, "")
    found = json.loads(output.read_text())
    assert [(p["grid"], p["image_tokens"], p["dtype"], p["encoder_form"]) for p in found["points"]] == [
        (None, 4, "bfloat16", "folded"), ([1, 2], 12, "bfloat16", "folded"),
    ]  # fmt: skip
    assert output.with_suffix(".md").read_text() == out and "| 8:1x2 | 12 |" in out and "measured" in out
    assert (
        output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and "<svg" in output.with_suffix(".svg").read_text()
    )


def test_the_variables_of_a_config_have_the_dtypes_that_a_loaded_model_has():
    model = build(vision=VISION, llm=LLM, dtype="bfloat16")
    variables = ttft_model.random_variables(model)
    assert {str(x.dtype) for x in jax.tree.leaves(variables["params"])} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(variables["batch_stats"])} == {"float32"}
    shapes = jax.tree.map(jnp.shape, nn.unbox(boxed_variables(model)))
    layers = shapes["params"]["llm"].pop("layers")
    found = jax.tree.map(jnp.shape, variables)
    own = found["params"]["llm"].pop("layers")
    assert found == shapes
    assert sorted(own) == [str(i) for i in range(LLM["num_layers"])]
    assert all(x == jax.tree.map(lambda s: s[1:], layers, is_leaf=lambda s: isinstance(s, tuple)) for x in own.values())


def test_an_encoder_in_training_form_is_folded_and_computes_the_same(tmp_path):
    config = {"vision": {**VISION, "form": "branched"}, "llm": LLM, "dtype": "float32"}
    model, variables = random_variables(config)
    convert.write(tmp_path / "model", "native", variables, config, None, {})
    subject = ttft_model.of_source(str(tmp_path / "model"), "float32")
    assert subject.model.vision_args["form"] == "folded" and subject.sizes == []
    images = np.random.default_rng(0).integers(0, 255, (1, 1, 8, 8, 3), np.uint8)
    ours = subject.model.apply(subject.variables, images, method="encode")
    np.testing.assert_allclose(ours, model.apply(variables, images, method="encode"), rtol=1e-4, atol=1e-5)


def test_a_model_with_tiles_sees_the_photo_in_the_grid_that_keeps_most_of_it():
    assert ttft_model.sizes_of(1024, ((1, 2), (2, 1), (2, 2))) == [(1024, (2, 2))]
    assert ttft_model.sizes_of(1024, ((2, 1), (1, 2))) == [(1024, (1, 2))]  # the photo is wider than high
    assert ttft_model.sizes_of(1024, ()) == [(1024, None)]


def point(**changed):
    parts = {name: {"median": 0.1, "p10": 0.09, "p90": 0.11} for name in ttft_page.COLUMNS}
    return {
        "encoder": "fastvithd", "llm": "0.5b", "image_size": 1024, "grid": None, "image_tokens": 256,
        "prompt_tokens": 64, "batch": 1, "dtype": "float32", "device": "a machine", "measured": True, "runs": 20,
        "parts": parts, "paper_ttft": 0.2, "user_ttft": 0.3, "compile_seconds": {"encoder": 7.0}, "peak_bytes": 2e9,
        "parameters": {"vision": 122.7e6}, "attention": "plain", **changed,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed, printed",
    [
        ({}, "167 = 116 + 50.5"),
        ({"grid": [2, 2], "image_tokens": 1280}, "918 = 582 + 336"),
        ({"image_size": 256, "image_tokens": 16}, "6.8 + -"),  # its prefill of 16 tokens by this model is not printed
        ({"image_size": 512, "image_tokens": 64}, "-"),
        ({"batch": 4}, "-"),
        ({"encoder": "mci2", "llm": "1.5b", "image_size": 256, "image_tokens": 64}, "-"),
    ],
)
def test_the_papers_table_10_stands_beside_its_own_sizes(changed, printed):
    last = ttft_page.sums_table([point(**changed)]).splitlines()[-1]
    assert last.endswith(f"| {printed} |")


def test_an_estimate_is_called_one_wherever_it_is_shown():
    estimated = point(measured=False, device="one chip of v5e:1x1", user_ttft=None)
    for shown in (ttft_page.text({"points": [estimated], "against": []}), ttft_page.title(estimated)):
        assert "ESTIMATED by the TPU compiler" in shown and "measured" not in shown


def test_the_tables_of_the_docs_name_each_column_and_replace_the_tables_before(tmp_path):
    page = tmp_path / "ttft.md"
    page.write_text(f"Before.\n{ttft_docs.BEGIN}\nold\n{ttft_docs.END}\nBehind.\n")
    chip = {
        **point(measured=False, device="one chip of v5e:1x1", user_ttft=None),
        "image_size": 512,
        "image_tokens": 64,
    }
    for name, points in (("a", [point()]), ("b", [chip])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"points": points, "against": []}))
    ttft_docs.fill(page, tmp_path)
    lines = page.read_text().splitlines()
    assert lines[0] == "Before." and lines[-1] == "Behind." and "old" not in lines
    header, _, small, large = lines[5:9]
    assert header == (
        "| image | tokens | a machine, fastvithd and 0.5b, float32: measured | "
        "one chip of v5e:1x1, fastvithd and 0.5b, float32: estimated by the TPU compiler | "
        "the paper's Table 10 (M1 Max, Core ML and MLX, float16): measured by its authors |"
    )
    assert small.startswith("| 512 |") and small.endswith("| - | 200 = 100 + 100 | - |")
    assert large == "| 1024 | 256 | 200 = 100 + 100 | - | 167 = 116 + 50.5 |"


def test_runs_of_different_number_are_told():
    assert "medians of 20 runs" in ttft_page.about([point(), point()])
    assert "medians of 8 to 20 runs" in ttft_page.about([point(), point(runs=8)])


def test_a_wrong_size_behind_good_ones_is_refused_before_anything_is_timed(model):
    with pytest.raises(ValueError, match=r"^--image_size=9: image size 9x9 must be a multiple of 4"):
        first_token.questions(model[0], "8,9", [], 3, 1)


def test_the_ratios_to_another_implementation_are_printed():
    other = {**point(), "name": "other", "parts": {"fused": {"median": 0.2, "p10": 0.1, "p90": 0.3}}}
    table = ttft_page.against_table([{**other, "ratios": {"fused": 0.5}}])
    assert table.splitlines()[-1] == "| other, 1024 | 200 (0.50) |"


def test_it_needs_neither_grain_nor_array_record():
    code = (
        "import sys; from fastvlm_jax.bench import ttft, ttft_model, ttft_page, ttft_transformers\n"
        "print(sorted({'grain', 'array_record', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_sizes_with_and_without_tiles_are_read():
    assert read_sizes("256, 1024,1024:2x3") == [(256, None), (1024, None), (1024, (2, 3))]


@pytest.mark.parametrize("text", ["", "0", "12.5", "2x2", "1024:2", "1024:0x2", "a", "256,", "256,256", "-64"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=f"--image_size={text}") as refused:
        read_sizes(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "name the model by either --model=DIR or --config=FILE.py:SIZE"),
        (("--config={config}", "--model=X"), "name the model by either --model=DIR or --config=FILE.py:SIZE"),
        (("--config={config}", "--against=transformers", "--topology=v5e:1x1"), "leave out --topology"),
        (("--config={config}", "--against=vllm"), "--against=vllm"),
        (("--config={config}", "--image_size=9"), "--image_size=9: image size 9x9 must be a multiple of 4"),
        (("--config={config}", "--image_size=big"), "--image_size=big: 'big' is no size: write sides in pixels"),
        (("--config={config}", "--prompt_tokens=40000"), "are more than the model's context of 32768 tokens"),
        (("--config={config}", "--batch=0"), "--batch=0"),
        (("--config={config}", "--output=ttft.md"), "--output=ttft.md must end in .json"),
        (("--model={folder}",), "this model has no language model, and a first token about an image needs one"),
        (("--model={folder}", "--topology=v5e:1x1", "--image_size=8"), "this model has no language model"),
        (("--model={folder}/none",), "there is no model at"),
        (("--config={config}", "--topology=v5e:9x9"), "--topology=v5e:9x9: v5e has no such slice"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(monkeypatch, capsys, config_file, encoder_folder, flags, message):
    written = [flag.format(config=config_file, folder=encoder_folder) for flag in flags]
    status, out, err = fastvlm(monkeypatch, capsys, "bench", "ttft", *written)
    assert status in (1, 2) and out == "" and message in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    config = {"vision": VISION, "dtype": "float32"}
    folder = tmp_path_factory.mktemp("encoder") / "model"
    convert.write(folder, "native", random_variables(config)[1], config, None, {})
    return folder


@pytest.mark.parametrize("name", VISION_SIZES)
def test_an_encoder_is_named_by_its_size(name):
    changed = {**VISION_SIZES[name], "image_mean": (0.1, 0.1, 0.1)}
    assert encoder_name(changed) == ("fastvithd" if name == "mci3" else name)


def test_models_of_other_sizes_are_described():
    assert [llm_name(sizes) for sizes in LLM_SIZES.values()] == list(LLM_SIZES)
    assert llm_name({**LLM_SIZES["0.5b"], "num_layers": 4, "vocab_size": 152_000}) == "4 of 24 layers of 0.5b"
    assert llm_name(LLM) == "decoder of 2 layers, 16 wide"
    assert encoder_name(VISION) == "fastvit of 1 blocks, 8 wide"
    assert encoder_name({**VISION_SIZES["clip_vit_l_336"], "num_layers": 2}) == "vit of 2 layers, 1024 wide"


def test_transformers_model_has_the_same_sizes_and_runs_the_same_parts():
    pytest.importorskip("torch_reference")
    from fastvlm_jax.bench import ttft_transformers

    vision = {**VISION, "layers": (1, 1), "embed_dims": (8, 16), "mixers": ("repmixer",) * 2}
    model, variables = random_variables({"vision": vision, "llm": LLM})
    ((name, other),) = ttft_transformers.prepare(model, TILES).items()
    assert name == "transformers, eager" and other.compile_seconds == {}
    assert other.parameters == sum(x.size for x in jax.tree.leaves(variables["params"]))
    times = {f"{name}/{part}": [1.0, 2.0, 4.0] for part in other.calls}
    for call in other.calls.values():
        call()
    assert other.calls["fused"]().shape == (2,) and other.calls["next_token"]().shape == (2,)
    ours = point(parts={part: {"median": 0.5} for part in other.calls})
    row = ttft_transformers.compared(name, other, ours, times)
    assert row["ratios"] == dict.fromkeys(("copy", "encoder", "projector", "prefill", "next_token", "fused"), 0.25)
