"""The arithmetic for GPUs and CPUs: bytes by hand, real arrays as reference for the state, names, messages, mends."""

import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
from command import fastvlm
from paths import ROOT
from small import ONE_STAGE
from small_pairs import small_pairs_config

from fastvlm_jax import sharding, stage
from fastvlm_jax.config import get_base
from fastvlm_jax.models import fastvlm as models
from fastvlm_jax.preflight import gpu, memory_table, too_small
from fastvlm_jax.preflight.liveness import peak

X, W = 4 * 8 * 256, 4 * 256 * 256  # bytes of x [8, 256] and w [256, 256] in float32
x, w = jax.ShapeDtypeStruct((8, 256), jnp.float32), jax.ShapeDtypeStruct((256, 256), jnp.float32)


def held(function, *args, labels=None, kernels=True, kept=()):
    """(bytes, kinds) at the fullest moment of a function; all arguments are labelled "argument"."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    found = peak(jaxpr, labels or ["argument"] * len(jaxpr.invars), kernels=kernels, kept=kept)
    assert sum(found.kinds.values()) == found.bytes
    return found.bytes, dict(found.kinds)


def test_element_wise_results_take_no_memory_of_their_own():
    # The product is the fullest moment: x, w and its result; tanh and the sum take the place of the product.
    assert held(lambda x, w: jnp.tanh(x @ w) + x, x, w) == (2 * X + W, {"argument": X + W, "workspace": X})


def test_a_value_is_held_to_its_last_use_and_a_kept_argument_to_the_end():
    def twice(x, w):
        y = x @ w
        return (y @ w) @ w

    # During the second product: w, y and its result; x is gone unless it is kept.
    assert held(twice, x, w)[0] == W + 2 * X
    assert held(twice, x, w, labels=["kept", "argument"], kept=("kept",))[0] == W + 3 * X


def test_a_loop_holds_its_stack_and_one_slice():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    stack = jax.ShapeDtypeStruct((3, 256, 256), jnp.float32)
    # x and the stack of 3 w; the result takes x's place; one turn holds a slice w and its product.
    assert held(layers, x, stack) == (X + 3 * W + W + X, {"argument": X + 3 * W, "workspace": W + X})


def test_kernels_take_the_leanest_form_of_a_choice_by_platform():
    def lean(x):
        return jnp.tanh(x)

    def large(x):
        return (x @ x.T) @ x  # [8, 8] = 256 bytes between

    def choice(x):
        return jax.lax.platform_dependent(x, cuda=lean, default=large)

    assert held(choice, x, kernels=True)[0] < held(choice, x, kernels=False)[0]
    assert held(choice, x, kernels=False)[0] == held(large, x)[0]


def test_what_the_passes_leave_to_each_other_has_a_name():
    def step(w1, w2, x):
        gradients = jax.grad(lambda w1, w2: jnp.sum(jnp.sin(jnp.sin(x @ w1) @ w2)), (0, 1))(w1, w2)
        with jax.named_scope("optimizer"):
            return [w - 0.1 * g for w, g in zip((w1, w2), gradients, strict=True)]

    tall = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
    _, kinds = held(step, w, w, tall, labels=["parameters", "parameters", "batch"], kept=("batch",))
    # While the gradient of w2 is made: x, both parameters, h = x @ w1 and sin(h) of the forward pass, and the gradient
    # of the last sine, in the place of what it is made from.
    T = 4 * 4096 * 256
    assert kinds == {"batch": T, "parameters": 2 * W, "activations": 2 * T, "workspace": T, "gradients": W}


def test_products_are_held_against_xla():
    """A chain of products with its gradient, compiled for this CPU, needs what the arithmetic says, within 10 %."""

    def step(ws, x):
        def loss(ws):
            for w in ws:
                y = jnp.tanh(x @ w)
                return jnp.sum(y @ w.T)

        gradients = jax.grad(loss)(ws)
        with jax.named_scope("optimizer"):
            return jax.tree.map(lambda w, g: w - 0.1 * g, ws, gradients)

    big = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    args = ([big], jax.ShapeDtypeStruct((4096, 512), jnp.float32))
    stats = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
    compiled = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    compiled += stats.temp_size_in_bytes
    assert held(step, *args, labels=["parameters", "batch"], kept=("batch",))[0] == pytest.approx(compiled, rel=0.1)


@pytest.fixture
def config():
    """A tiny model whose encoder is frozen, with a small batch."""
    c = get_base("tiny")
    c.groups = (("vision/.*", 0.0, 0.0), (".*", 1e-3, 0.0))
    c.data.image_size, c.data.groups, c.data.images_per_group, c.data.row_length = 64, 8, 1, 64
    return c


@pytest.mark.parametrize("mesh, count", [((1, 1, 1, 1), 1), ((1, 2, 2, 2), 8)])
def test_the_state_has_the_bytes_of_real_arrays(config, mesh, count):
    """Moving averages count as the optimizer's."""
    config.mesh, config.ema = mesh, 0.5
    found, abstract, counts = gpu.memory(config, gpu.parse(f"gpu:{count}x80GB"))
    assert config.data.groups == 8
    devices = jax.devices()[:count]
    real = sharding.make_mesh(mesh, devices)
    assert dict(abstract.shape) == dict(real.shape)
    with jax.set_mesh(real):
        model = models.build(**config.model.to_dict())
        state = stage.make_step(config, model, real, steps=10).make_state(jax.random.key(0), None)

    def on_first(tree):
        return sum(
            s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == devices[0]
        )

    assert found["parameters"] == on_first((state.params, state.batch_stats))
    assert found["optimizer"] == on_first((state.step, state.opt_state, state.guard, state.average))
    # A group of this batch by hand: 64 x 64 pixels, a mask, 64 tokens in six int32 fields, and a mask of the loss.
    assert found["batch"] == (8 // (count // 2 or 1)) * (64 * 64 * 3 + 1 + 64 * (6 * 4 + 1))
    assert counts["all"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))


ADAPTERS = (("lora/.*", 2e-4, 0.0), (".*", 0.0, 0.0))


def products_of(jaxpr):
    """Shapes of the results of all matrix products of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            yield from products_of(inner) if hasattr(inner, "eqns") else ()


def test_a_step_with_adapters_makes_no_gradient_of_their_kernels(config):
    """The gradient of a kernel [I, O] is a product of that shape or of [O, I]; a layer is one slice of the stack."""
    assert (config.model.llm.width, config.model.llm.mlp_dim) == (96, 256)
    kernels = {(96, 96), (48, 96), (96, 256)}  # of q and o, k and v, the MLP; 48 = 2 heads of 24
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in ONE_STAGE.items()})
    mesh, found = sharding.abstract_mesh((1, 1, 1, 1)), {}
    for rank, groups in ((0, config.groups), (2, ADAPTERS)):
        config.lora.rank, config.groups = rank, groups
        with jax.sharding.use_abstract_mesh(mesh):
            model = models.build(**config.model.to_dict())
            step = stage.make_step(config, model, mesh, steps=10)
            jaxpr = jax.make_jaxpr(step.fn)(step.abstract, stage.abstract_batch(config, model, mesh)).jaxpr
        found[rank] = {tuple(sorted(shape)) for shape in products_of(jaxpr)}
    assert kernels <= found[0] and not kernels & found[2]
    assert {(2, 96), (2, 48), (2, 256)} <= found[2]  # those of the adapters


@pytest.fixture(scope="module")
def adapted():
    """What gpu.memory finds of 16 samples of FastVLM-0.5B at 1024 px on one card, with adapters."""
    return gpu.memory(memory_table.config_of("0.5b", 1024, lora=True), gpu.parse("gpu:24GB"))


def test_a_step_with_adapters_holds_a_seventh_of_the_state_and_gradients_of_the_whole(adapted):
    found, _, counts = adapted
    # A layer of Qwen2-0.5B has 896 channels, 2 key and value heads of 64 and an MLP of 4864: rank times inputs plus
    # outputs of q and o, k and v, gate, up and down. Two moments of 4 bytes each, and gradients of 4.
    adapters = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert counts["lora"] == counts["trainable"] == adapters == 8_798_208
    small = 4 * (2 + 3 + 128)  # counts and what the guard keeps
    assert found["optimizer"] == pytest.approx(8 * adapters, abs=2 * small)
    assert found["gradients"] <= 4 * adapters
    # Qwen2-0.5B's 494,032,768 parameters in bfloat16, but for biases of q, k and v and 49 norms; the others of the
    # model have a few such vectors too.
    assert counts["llm"] == 494_032_768
    others, vectors = counts["vision"] + counts["projector"], 24 * (896 + 2 * 128) + 49 * 896
    least = 4 * adapters + 2 * (counts["llm"] + others) + 2 * vectors
    assert least < found["parameters"] < least + 0.01 * 2 * others
    # The whole model in float32: itself, two moments and gradients.
    part, whole = found["parameters"] + found["optimizer"] + 4 * adapters, 16 * (counts["llm"] + others)
    assert 0.13 < part / whole < 1 / 7


def test_the_page_has_what_the_arithmetic_says_of_a_model(adapted):
    row = memory_table.Row("0.5b", 1024, True, (sum(adapted[0].values()),))
    assert memory_table.text([row]).splitlines()[-1] in (ROOT / "docs/gpu.md").read_text()


def test_frozen_kernels_have_copies_in_float32_on_a_cpu(config):
    """As programs compiled for a CPU have (docs/gpu.md)."""
    params = {
        "llm": {"q": {"kernel": jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16)}, "norm": {"scale": w}},
        "embedding": jax.ShapeDtypeStruct((9, 8), jnp.bfloat16),  # the trace has that of the words
        "lora": {"llm": {"q": {"kernel": {"a": x}}}},
    }
    assert gpu.widened(config, params) == 3 * 8 * 4 * 4
    config.model.dtype = "bfloat16"
    assert gpu.widened(config, params) == 0


def test_settings_are_tried_one_beside_the_other_until_the_smallest_card_suffices():
    needs = iter([30 * 10**9, 20 * 10**9, 11_520_000_000, 1])
    tried = []

    def need(config):
        tried.append((config.model.vision.remat, config.moment_dtype, config.optimizer))
        return next(needs)

    # With the margin of 1.25 into 0.75 of a card of 16 GB go 9.6e9 bytes, into 0.9 of it 11.52e9.
    config = memory_table.config_of("0.5b", 512, lora=False)
    found = memory_table.try_settings(config, memory_table.WHOLE, 16e9, need)
    assert tried == [
        ("depthwise", "float32", "adamw"), ("full", "float32", "adamw"), ("full", "bfloat16", "adamw"),
    ]  # fmt: skip
    assert found == (30_000_000_000, 30_000_000_000, 20_000_000_000, 11_520_000_000)
    row = memory_table.Row("0.5b", 512, False, found)
    told = {size: memory_table.verdict(row, size * 1e9) for size in (15.9, 16, 27.8, 41.7, 50)}
    assert told == {15.9: "no", 16: "S R M", 27.8: "S R", 41.7: "S", 50: "yes"}


@pytest.mark.parametrize(
    "name, count, size",
    [("gpu:80GB", 1, 80e9), ("gpu:8x80GB", 8, 80e9), ("gpu:24GB", 1, 24e9), (" gpu:1x0.5GB", 1, 5e8)],
)
def test_names_of_gpus(name, count, size):
    assert gpu.is_arithmetic(name)
    found = gpu.parse(name)
    assert (found.count, found.bytes) == (count, size)


@pytest.mark.parametrize("name", ["gpu:80", "gpu:0x80GB", "gpu:0GB", "gpu:", "gpu:h100", "gpu:8*80GB", "gpu:80GBx8"])
def test_other_names_are_refused_with_the_form(name):
    with pytest.raises(ValueError, match=r"^--topology=.*: write gpu:80GB for a GPU of 80 GB, gpu:8x80GB for eight"):
        gpu.parse(name)


def test_a_cpu_is_this_machine_or_one_of_another_size():
    assert gpu.parse("cpu:24GB") == gpu.Gpus("cpu:24GB", 1, 24e9)
    assert gpu.parse(" cpu:0.5GB ").bytes == 5e8
    (told,) = re.findall(r"^MemTotal: +(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert gpu.parse("cpu").bytes == 1024 * int(told)
    assert gpu.is_arithmetic("cpu") and gpu.is_arithmetic("cpu:24GB") and not gpu.is_arithmetic("v5e:2x2")


@pytest.mark.parametrize("name", ["cpu:24", "cpu:0GB", "cpu:", "cpu:GB", "cpus", "cpu:2x24GB", "cpu:-1GB", "cpu:1e3GB"])
def test_other_names_of_cpus_are_refused_with_the_form(name):
    with pytest.raises(ValueError, match=rf"^--topology={name}: write cpu for this machine, cpu:24GB for one with 24 "):
        gpu.parse(name)


def test_the_share_of_a_card_follows_the_environment(monkeypatch):
    for name in gpu.SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert gpu.usable_share() == 0.75  # what JAX takes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert gpu.usable_share() == 0.92
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90%")
    with pytest.raises(ValueError, match=r"^XLA_CLIENT_MEM_FRACTION=90% must be a share above 0 and up to 1, as 0.9$"):
        gpu.usable_share()


def test_what_does_not_fit_gets_mends_that_do(config, monkeypatch):
    for name in gpu.SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    needed = 1.25 * sum(gpu.memory(config, gpu.parse("gpu:1GB"))[0].values())
    card = f"gpu:{0.9 * needed / 0.75 / 1e9:.4f}GB"  # a tenth too small, behind the share that JAX takes
    report = gpu.preflight(config, card)
    assert not report["memory"]["fits"] and report["estimated_by"] == "arithmetic"
    assert report["memory"]["limit"] == pytest.approx(0.9 * needed, rel=0.02)
    told = gpu.text(report)
    assert "DOES NOT FIT" in told and "by the same arithmetic" in told and "no compiler" in told.lower()
    flags = [mend.split()[0] for mend in report["mends"]]
    assert "--config.accumulate=2" in flags and "--config.data.groups=4" in flags
    config.data.groups = 4
    assert gpu.preflight(config, card)["memory"]["fits"]


def test_a_run_of_stage_0_that_does_not_fit_gets_mends_for_its_towers():
    """Each changes the config alone, and none the config that is given."""
    config = small_pairs_config()
    before = config.to_json()
    tried = {kind: changed for kind, _, changed, _ in gpu._changes(config, gpu.parse("gpu:1GB"))}
    assert list(tried) == ["accumulate", "remat vision", "remat text", "moments", "groups", "gpus"]
    assert tried["remat text"].model.text.remat == "full" and tried["remat text"].model.vision.remat == "none"
    assert tried["gpus"].data.groups == 4 and config.to_json() == before


def test_a_run_that_does_not_fit_is_told_what_would_the_cheapest_first(config, monkeypatch):
    needed = sum(gpu.memory(config, gpu.parse("gpu:1GB"))[0].values())

    def device(limit):
        return types.SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "local_devices", lambda: [device(0.9 * 1.25 * needed)])
    told = too_small.advice(config)
    assert "\n" not in told and f"a step needs about {needed / 2**30:.2f} GiB, 1.25 times that when compiled" in told
    assert f"of the {0.9 * 1.25 * needed / 2**30:.2f} GiB of a device" in told
    found = [told.index(word) for word in ("--config.accumulate=2 ", "--config.data.groups=4 ", "more devices")]
    assert found == sorted(found)
    monkeypatch.setattr(jax, "local_devices", lambda: [device(None)])  # a CPU
    assert too_small.advice(config) == ""


def test_the_command(monkeypatch, capsys, tmp_path):
    config = f"--config={ROOT}/configs/quickstart.py:stage2_instruct"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")  # says nothing of a CPU
    status, out, err = fastvlm(
        monkeypatch, capsys, "preflight", config, "--topology=cpu:24GB", f"--output={tmp_path}/a.json"
    )
    assert (status, err) == (0, "") and "cpu:24GB, by arithmetic" in out and "fits" in out
    assert "GiB a CPU, by arithmetic" in out and "x 1.7" in out and "limit: the memory of the machine" in out
    found = json.loads((tmp_path / "a.json").read_text())
    memory = found["memory"]
    assert (memory["margin"], memory["share"], memory["limit"], found["estimated_by"]) == (1.7, 1, 24e9, "arithmetic")
    assert memory["with_margin"] == pytest.approx(1.7 * sum(memory[part] for part in gpu.PARTS))
    status, _, err = fastvlm(monkeypatch, capsys, "preflight", config, "--topology=gpu:24GB", "--mode=generate")
    assert status == 2 and err.count("\n") == 1 and "--mode needs a compiler" in err
    status, _, err = fastvlm(
        monkeypatch, capsys, "preflight", config, "--topology=gpu:2x24GB", "--config.mesh=(1, 3, 1, 1)"
    )
    assert status == 1 and err.count("\n") == 1 and "needs 3 devices, there are 2" in err
