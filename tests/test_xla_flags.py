"""The compiler's flags: accepted by the real TPU compiler, set where they belong, never over the user's own."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from command import fastvlm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastvlm_jax import sharding, xla_flags
from fastvlm_jax.preflight import topology


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
def test_the_tpu_compiler_takes_every_flag_and_refuses_others():
    devices = topology.devices(topology.parse("v5e:2x2"))
    mesh = sharding.make_mesh((1, 1, -1, 1), devices)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    with topology.compiler():
        lowered = jax.jit(lambda x, w: jnp.sum(x @ w)).lower(x, x)
        options = xla_flags.compiler_options("tpu")
        assert set(options) == set(xla_flags.TPU) and len(options) >= 2
        assert "all-gather" in lowered.compile(compiler_options=options).as_text()
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_flag"):
            lowered.compile(compiler_options={**options, "xla_tpu_no_such_flag": "true"})


def test_flags_go_to_the_variable_of_the_platform_and_a_cpu_gets_none():
    for platform in ("cpu", "tpu", "gpu"):
        environment = {}
        xla_flags.apply(environment, platform)
        assert set(environment) == {"cpu": set(), "tpu": {"LIBTPU_INIT_ARGS"}, "gpu": {"XLA_FLAGS"}}[platform]
    environment = {"LIBTPU_INIT_ARGS": "--xla_tpu_enable_latency_hiding_scheduler=false --other=1"}
    xla_flags.apply(environment, "tpu")
    given = environment["LIBTPU_INIT_ARGS"].split()
    assert given[:2] == ["--xla_tpu_enable_latency_hiding_scheduler=false", "--other=1"]
    others = {name: value for name, value in xla_flags.TPU.items() if "latency_hiding" not in name}
    assert given[2:] == [f"--{name}={value}" for name, value in others.items()] and len(others) >= 2


def test_what_the_user_set_is_no_option_of_a_compilation(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_latency_hiding_scheduler=false")
    assert set(xla_flags.TPU) - set(xla_flags.compiler_options("tpu")) == {"xla_tpu_enable_latency_hiding_scheduler"}
    assert xla_flags.compiler_options("cpu") == {}


def test_the_platform_is_the_first_that_jax_is_told():
    assert xla_flags.find_platform({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"
    assert xla_flags.find_platform({"JAX_PLATFORMS": "tpu"}) == "tpu"
    assert xla_flags.find_platform({"JAX_PLATFORMS": "cpu"}) == "cpu"


def test_train_sets_them_first(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert fastvlm(monkeypatch, capsys, "train")[0] == 2
    set_now = os.environ["XLA_FLAGS"]
    assert set_now == "--xla_force_host_platform_device_count=8 --xla_gpu_enable_latency_hiding_scheduler=true"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
@pytest.mark.skipif(xla_flags.find_platform({}) != "cpu", reason="another machine than one without TPU and GPU")
def test_libtpu_without_a_tpu_says_nothing():
    code = "from fastvlm_jax import xla_flags; xla_flags.silence_libtpu(); import jax; print(jax.devices()[0].platform)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "TPU", "XLA"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize("told", [True, False])
def test_the_compilers_alarms_about_slow_compilation_stay_off_the_terminal(told):
    """A sum over windows that XLA folds for more than a second, which it reports with a request to file a bug."""
    code = (
        "from fastvlm_jax import xla_flags; xla_flags.silence_compiler(); import jax, numpy as np\n"
        "x = np.ones((120, 120), np.float32)\n"
        "jax.jit(lambda y: jax.lax.reduce_window(x, 0., jax.lax.add, (40, 40), (1, 1), 'SAME') + y).lower(1.).compile()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "0"} if told else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert ("file a bug" in done.stderr) == told, done.stderr
