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
# XLA's threads: a collective takes one of each device until all have come.
os.environ["NPROC"] = "32"
# The same step is compiled by several tests and processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
