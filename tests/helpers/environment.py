"""The environment of jax in the tests: eight fake CPU devices. Import it before jax."""

import os

from paths import ROOT

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Slow steps on two cores trip XLA's default patience for collectives.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # Most of the suite's time is compilation; the models are tiny, so slower code costs nothing.
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# The same step is compiled by several tests and processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))

from jax._src import compiler

compile_or_get_cached = compiler.compile_or_get_cached


def compile_or_get_cached_on_one_device(backend, module, devices, options, callbacks, executable_devices, *rest):
    """Leaves programs of several devices out of the cache.

    A CPU program that comes from the cache has lost the order of its collectives (jaxlib 0.10.2): devices that start
    with different ones wait for each other for ever.
    """
    if devices.size > 1:
        return compiler.backend_compile_and_load(backend, module, executable_devices, options, callbacks)
    return compile_or_get_cached(backend, module, devices, options, callbacks, executable_devices, *rest)


compiler.compile_or_get_cached = compile_or_get_cached_on_one_device
