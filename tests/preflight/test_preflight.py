"""Tests `fastvlm preflight` with the real TPU compiler: tiny programs for four v5e chips."""

import contextlib
import importlib.util
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import fastvlm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from paths import HELPERS, ROOT

from fastvlm_jax import sharding, stage
from fastvlm_jax.config import get_base
from fastvlm_jax.models import kinds
from fastvlm_jax.preflight import estimate, search, topology
from fastvlm_jax.preflight.compile import compile
from fastvlm_jax.preflight.hlo import cost, parse
from fastvlm_jax.preflight.run import Options, preflight

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from small import small_config
def get_config():
    return small_config(
        "", mesh=(1, 1, 4, 1), model__vision__form="folded", model__vision__batch_norm="frozen"
    )
"""
WIDTH, HIDDEN, LAYERS, ROWS = 256, 512, 3, 1024


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Sets a cache of compiled programs for this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(CONFIG.format(tests=str(HELPERS)))
    return file


@pytest.fixture(scope="module")
def found(config_file, cache, tmp_path_factory):
    """Returns (exit status, text, JSON) of the train step of the smallest config."""
    output = tmp_path_factory.mktemp("out") / "report.json"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        status, _, _ = fastvlm(patch, Silent(), "preflight", *asked(config_file), f"--output={output}")
    return status, printed.getvalue(), json.loads(output.read_text())


class Silent:
    """Replaces capsys in a fixture, where capsys is not available."""

    def readouterr(self):
        return "", ""


def asked(config_file, *more):
    return [f"--config={config_file}", "--topology=v5e:2x2", *more]


def test_a_sharded_loop_over_layers_is_counted_as_it_runs():
    """Compiles forward and backward of x + tanh(x A) B over LAYERS layers, with weights sharded over four chips."""
    slices = topology.parse("v5e:2x2")
    mesh = sharding.make_mesh((1, 1, 4, 1), topology.devices(slices))

    def loss(weights, x):
        def layer(x, w):
            a, b = (sharding.constrain(part, (None, None)) for part in w)
            return x + jnp.tanh(x @ a) @ b, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32) ** 2)

    def lower():
        def array(spec, *shape):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

        weights = array(P(None, "fsdp"), LAYERS, WIDTH, HIDDEN), array(P(None, None, "fsdp"), LAYERS, HIDDEN, WIDTH)
        x = array(P("fsdp"), 4 * ROWS, WIDTH)
        shardings = tuple(w.sharding for w in weights)
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(loss), out_shardings=shardings).lower(weights, x), weights, x

    compiled, _, _ = compile(lower, slices, mesh)
    again, _, _ = compile(lower, slices, mesh)
    assert (compiled.cached, again.cached) == (False, True)
    assert compiled.text == again.text and compiled.memory == again.memory
    found = cost.analyse(parse.parse(compiled.text), 4)
    one = 2 * ROWS * WIDTH * HIDDEN  # one product on one chip; a layer has 2 forward, 1 or 2 recomputed, 4 backward
    products = sum(o.flops * o.trips for o in found.operations) / one / LAYERS
    assert products in (7, 8)
    by_kind = {}
    for c in found.collectives:
        assert cost.axes_of(c.group, dict(mesh.shape)) == ("fsdp",)
        by_kind[c.kind] = by_kind.get(c.kind, 0) + c.payload * c.trips
    weight = LAYERS * WIDTH * HIDDEN * 2
    assert by_kind["all-gather"] == 2 * 2 * weight  # both weights, forward and backward
    assert sum(by_kind.get(kind, 0) for kind in ("all-reduce", "reduce-scatter")) == pytest.approx(2 * weight, rel=0.01)
    assert compiled.memory["arguments"] == (2 * weight + 4 * ROWS * WIDTH * 2) / 4
    times = estimate.timing(found, slices, list(mesh.devices.flat))
    assert 0 < times["roofline"]["matrix units"] < times["compute_s"] <= times["scheduled_s"] <= times["serial_s"]
    assert times["hidden_s"] <= times["scheduled_s"]
    assert times["compute_s"] < 0.01


def test_the_report_of_a_train_step(found):
    status, text, report = found
    assert status == 0
    assert "Nothing ran on a TPU: every time below is an estimate." in text
    assert "fits" in text and "DOES NOT FIT" not in text
    assert report["mesh"] == {"replica": 1, "data": 1, "fsdp": 4, "tensor": 1}
    assert report["topology"]["chips"] == 4
    m = report["memory"]
    assert m["fits"] and m["limit"] == 15.75 * 2**30
    assert m["total"] == pytest.approx(m["state"] + m["batch"] + m["activations"])
    assert m["batch"] == 2 * (16 * 16 * 3 + 1 + 8 * 80 * (6 * 4 + 1))  # two of the eight groups
    counts = report["parameters"]
    assert counts["all"] == counts["trainable"] == counts["vision"] + counts["projector"] + counts["llm"]
    # Parameters and Adam's two moments, in float32; small ones are replicated on every chip.
    assert 3 * 4 * counts["all"] / 4 < m["state"] < 3 * 4 * counts["all"]
    assert report["flops"]["compiled_over_hardware"] == pytest.approx(1, abs=0.15)
    assert {row["kind"] for row in report["collectives"]} >= {"all-gather"}
    assert sum(o["share"] for o in report["operations"]) < 1
    times = report["time"]
    assert sum(times["by_part"].values()) == pytest.approx(times["compute_s"])
    rates = report["rates"]
    assert rates["images/s"] == pytest.approx(8 / times["scheduled_s"])
    assert rates["mfu"] == pytest.approx(
        sum(report["flops"]["model"].values()) / times["scheduled_s"] / (4 * 197e12), rel=1e-6
    )


def test_a_repeat_is_read_from_the_cache_and_tells_the_hours(found, config_file, monkeypatch, capsys, tmp_path):
    output = tmp_path / "again.json"
    more = ["--records=8000", "--config.steps=0", "--top=2", f"--output={output}"]
    status, text, _ = fastvlm(monkeypatch, capsys, "preflight", *asked(config_file, *more))
    report = json.loads(output.read_text())
    assert status == 0 and report["compile"]["cached"] and "read from the cache" in text
    assert report["time"] == found[2]["time"] and report["memory"] == found[2]["memory"]
    stage = report["stage"]
    assert stage["steps"] == 1000
    assert stage["hours"] == pytest.approx(1000 * report["time"]["scheduled_s"] / 3600)
    assert stage["chip_hours"] == pytest.approx(4 * stage["hours"])
    assert len(report["operations"]) == 2


def test_what_does_not_fit_ends_with_what_would(config_file, monkeypatch, capsys):
    more = ["--config.model.llm.num_layers=800000", "--config.model.llm.remat=full", "--config.data.groups=16"]
    more += ["--config.data.rows_per_group=1", "--config.data.row_length=16"]
    status, text, _ = fastvlm(monkeypatch, capsys, "preflight", *asked(config_file, *more))
    assert status == 1
    assert "DOES NOT FIT" in text
    assert "what would make it fit (by arithmetic, not compiled):" in text
    assert "--config.moment_dtype=bfloat16" not in text  # saves too little
    assert "--topology=v6e:4x4" in text and "--topology=v5p:2x2x1" in text


def test_generation_tells_its_first_and_its_further_tokens(config_file, monkeypatch, capsys, tmp_path):
    output = tmp_path / "generate.json"
    more = ["--mode=generate", "--rows=4", "--prompt_tokens=12", "--max_tokens=8", f"--output={output}"]
    status, text, _ = fastvlm(monkeypatch, capsys, "preflight", *asked(config_file, *more))
    report = json.loads(output.read_text())
    assert status == 0
    assert "estimated time to first token" in text and "each further token" in text
    assert report["batch"]["tokens_of_a_row"] == 4 + 12
    prefill, decode = report["time"]["prefill"], report["time"]["decode"]
    assert prefill["scheduled_s"] > decode["scheduled_s"] > 0
    assert report["rates"]["tokens/s"] == pytest.approx(4 / decode["scheduled_s"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v5e:3x3"], "--topology=v5e:3x3: v5e has no such slice"),
        (["--config.mesh=(1,1,3,1)"], "needs 3 devices, there are 4"),
        (["--config.data.groups=2"], "data.groups=2 does not divide over 4 data shards"),
        (["--config.data.groups=2", "--config.data.rows_per_group=1", "--config.data.images_per_group=2",
          "--config.data.row_length=300"], "set --config.data.groups=4 --config.data.images_per_group=1"),
        (["--config.mesh=(1,1,1,4)"], "does not divide 2 key-value heads; use fsdp"),
        (["--config.accumulate=3"], "accumulate=3 must divide data.groups=8"),
        (["--mode=generate", "--rows=3"], "--rows=3 does not divide over 4 data shards: make it a multiple of 4"),
        (["--mode=generate", "--search"], "--search ranks training settings"),
        (["--config.model.vision.remat=some"], "remat='some' must be one of none, full"),
    ],
)  # fmt: skip
def test_bad_use_is_one_line_with_the_mend(config_file, monkeypatch, capsys, flags, message):
    status, _, error = fastvlm(monkeypatch, capsys, "preflight", *asked(config_file, *flags))
    assert status == 1
    assert error.startswith("fastvlm preflight: ") and error.count("\n") == 1
    assert message in error


def test_without_the_compiler_it_tells_what_to_install(config_file, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else there(name, *a))
    status, _, error = fastvlm(monkeypatch, capsys, "preflight", *asked(config_file))
    assert status == 1 and error.count("\n") == 1
    assert "pip install 'fastvlm_jax[preflight]'" in error


def test_the_encoder_alone(config_file, monkeypatch, capsys, tmp_path):
    output = tmp_path / "encoder.json"
    more = ["--mode=encoder", "--rows=4", f"--output={output}"]
    status, text, _ = fastvlm(monkeypatch, capsys, "preflight", *asked(config_file, *more))
    report = json.loads(output.read_text())
    assert status == 0 and "M cycles an image" in text and "temporaries" in text
    assert report["batch"] == {"images": 4, "image_size": 16}
    # Without recomputation; the first convolution needs no gradient of the image.
    assert report["flops"]["compiled"] == pytest.approx(report["flops"]["model"]["vision"], rel=0.35)


def test_candidates_fit_divide_and_are_ranked(config_file):
    spec = importlib.util.spec_from_file_location("tiny", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.rows_per_group = 1
    ranked = search.rank(config, topology.parse("v5e:2x2"))
    seconds = [candidate.seconds for candidate in ranked]
    assert seconds == sorted(seconds) and all(c.bytes < 15.75 * 2**30 for c in ranked)
    for candidate in ranked:
        s = candidate.settings
        assert math.prod(s["mesh"]) == 4
        assert s["data.groups"] * s["data.images_per_group"] == 8
        assert s["data.groups"] % (np.prod(s["mesh"][:3]) * s["accumulate"]) == 0
    own = search.given(config, sharding.make_mesh((1, 1, 4, 1), jax.devices()[:4]))
    chosen = search.choose(ranked, own, 3)
    assert len({(c.settings["mesh"], c.settings["model.llm.remat"]) for c in chosen}) > 1
    settings = [search.flags(c.settings, own) for c in chosen]
    assert settings[0] == "" and all(settings[1:]) and len(set(settings)) == 4  # the config's own comes first
    assert chosen[0].apply(config).data.groups == config.data.groups


@pytest.mark.parametrize("optimizer, ema", [("adamw", 0.5), ("adafactor", 0.0), ("lion", 0.0)])
def test_the_arithmetic_counts_the_slots_of_each_optimizer(optimizer, ema):
    """As many bytes more or less than with AdamW as the state of a real step has."""
    counted, kept = [], []
    for changes in ({}, {"optimizer": optimizer, "ema": ema}):
        config = get_base("0.5b")
        config.data.groups, config.data.row_length, config.mesh = 4, 512, (1, 4, 1, 1)
        config.update(changes)
        ranked = search.rank(config, topology.parse("v5e:2x2"))
        counted.append(min(c.bytes for c in ranked if c.settings["mesh"] == config.mesh))
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
        state = stage.make_step(config, kinds.build(**config.model.to_dict()), mesh, steps=10).abstract
        slots = jax.tree.leaves((state.opt_state, state.average and state.average["params"]))
        kept.append(sum(math.prod(x.shape) * x.dtype.itemsize for x in slots))
    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.01)


SMALL = {"data.groups": 64, "data.images_per_group": 2, "data.row_length": 1024}


@pytest.mark.parametrize(
    "size, name, changed, gib, milliseconds",
    [
        # Compiled by libtpu 0.0.52, with the encoder's kernels.
        ("0.5b", "v5e:4x4", {}, 6.37, 424),
        ("7b", "v5e:8x8", {"mesh": (1, 4, 16, 1), **SMALL}, 12.54, 707),
        ("7b", "v6e:8x8", SMALL, 10.01, 488),
    ],
)
def test_arithmetic_is_near_what_the_compiler_finds(size, name, changed, gib, milliseconds):
    path = ROOT / "configs/stage2_instruct.py"
    spec = importlib.util.spec_from_file_location("stage2_instruct", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, slices = module.get_config(size), topology.parse(name)
    config.update_from_flattened_dict(changed)
    ranked = search.rank(config, slices)
    own = search.given(config, sharding.make_mesh(config.mesh, topology.devices(slices)))
    (candidate,) = (c for c in ranked if not search.differing(c.settings, own))
    assert candidate.bytes / 2**30 == pytest.approx(gib, rel=0.2)
    assert 1e3 * candidate.seconds == pytest.approx(milliseconds, rel=0.1)


def test_several_slices_are_joined_by_replicas(config_file):
    spec = importlib.util.spec_from_file_location("tiny", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    with pytest.raises(ValueError, match="needs 4 devices, there are 8"):
        preflight(config, "v5e:2x2*2", Options(top=1))
    config.mesh = (1, 1, -1, 1)
    report = preflight(config, "v5e:2x2*2", Options(top=1))
    assert report["mesh"] == {"replica": 2, "data": 1, "fsdp": 4, "tensor": 1}
    between = [row for row in report["collectives"] if row["axes"] == "slices (DCN)"]
    assert between and all(row["kind"] == "all-reduce" for row in between)
    # The slices exchange float32 gradients: the shard of each chip, and all of the small parameters' gradients.
    whole = 4 * report["parameters"]["all"]
    assert whole / 4 <= sum(row["bytes"] for row in between) <= 1.3 * whole
    assert report["time"]["roofline"]["DCN"] > 0


def test_only_replicas_cross_from_slice_to_slice():
    devices = topology.devices(topology.parse("v5e:2x2*2"))
    mesh = sharding.make_mesh((2, 1, 2, 2), devices)
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="there are 2 slices, which only the replica axis may cross"):
        sharding.make_mesh((1, 2, 4, 1), devices)
    assert dict(sharding.make_mesh((1, 1, -1, 1), devices).shape) == {"replica": 2, "data": 1, "fsdp": 4, "tensor": 1}
