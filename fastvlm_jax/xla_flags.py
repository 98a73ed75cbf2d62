"""The flags that compilers are given, each with its reason and source: the only place that sets any.

`apply()` puts them into the environment of `fastvlm train` before jax is imported; `compiler_options()` gives those for
TPU to a single compilation, as preflight makes it. What a user has set in the environment stands, and CPUs get none.

Looked at and left out, for they change nothing: of an FSDP step of four scanned layers for v5e:2x2, libtpu 0.0.52
compiles the same program, to the instruction, with and without --xla_enable_async_all_gather, ..._all_reduce,
..._reduce_scatter_fusion, --xla_tpu_enable_async_collective_fusion_fuse_{all_gather,all_reduce,reduce_scatter},
..._multiple_steps, --xla_tpu_overlap_compute_collective_tc, --xla_tpu_enable_ag_backward_pipelining and
--xla_latency_hiding_scheduler_rerun=2 (MaxText's list, benchmarks/xla_flags_library.py); for two slices, also with and
without --xla_tpu_enable_data_parallel_all_reduce_opt and --xla_tpu_data_parallel_opt_different_sized_ops. With
--xla_tpu_scoped_vmem_limit_kib=65536 temporaries take half as much again, and the estimated cycles stay.
"""

import glob
import importlib.util
import os
from collections.abc import MutableMapping

# Collectives beside the computation. libtpu 0.0.52 does both unasked: they are said here so that another libtpu trains
# what preflight was asked about. Of the four gathers of weights in that step two then lie in fusions with a matrix
# product, in pieces; with either flag off all four stand alone (and temporaries take 68 MB, not 101). Source: MaxText's
# list, and the compiled program.
TPU = {
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    # No product in pieces, each with a collective-permute, where a gradient is scattered: never, below this many MiB.
    # Made for large weights, it is chosen for the encoder's small ones on 16 chips: pieces of 48 columns for units of
    # 128, each reading all activations anew. Stage 2, 0.5B with 2 layers, v5e:4x4, without and with this flag: encoder
    # 573 and 463 ms (estimated), FLOPs 1.20 and 1.01 of what the model needs. The 7B step for v5e:8x8 has none anyway.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
# Off in XLA unless it is asked for (xla/debug_options_flags.cc). NVIDIA sets it in its JAX images: collectives move to
# where they run beside kernels (https://docs.nvidia.com/jax-toolbox/environment-variables).
GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}
# Without a TPU, what libtpu would look for, and complain that it is not there.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
VARIABLES = {"tpu": ("LIBTPU_INIT_ARGS", TPU), "gpu": ("XLA_FLAGS", GPU)}


def compiler_options(platform: str) -> dict[str, str]:
    """For `jax.stages.Lowered.compile(compiler_options=...)`, without those that the environment sets; {} for "cpu"."""
    if platform not in VARIABLES:
        return {}
    variable, flags = VARIABLES[platform]
    return {name: value for name, value in flags.items() if f"--{name}" not in _names(os.environ.get(variable, ""))}


def apply(environment: MutableMapping[str, str] = os.environ, platform: str | None = None) -> None:
    """Adds the flags of `platform`, this machine's by default, to its variable. To be called before jax is imported."""
    platform = platform or find_platform(environment)
    if platform in VARIABLES:
        variable, flags = VARIABLES[platform]
        given = environment.get(variable, "")
        missing = [f"--{name}={value}" for name, value in flags.items() if f"--{name}" not in _names(given)]
        environment[variable] = " ".join([given, *missing]).strip()


def silence_libtpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where libtpu is installed without a TPU, as for preflight, it would say so in ten lines at every start."""
    if find_platform(environment) != "tpu":
        for name, value in NO_TPU.items():
            environment.setdefault(name, value)


def find_platform(environment: MutableMapping[str, str]) -> str:
    """ "tpu", "gpu" or "cpu": the first of JAX_PLATFORMS, else by the machine's device files."""
    chosen = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if chosen:
        return {"cuda": "gpu"}.get(chosen, chosen)
    if importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return "tpu"
    return "gpu" if glob.glob("/dev/nvidia[0-9]*") else "cpu"


def _names(flags: str) -> set[str]:
    return {flag.partition("=")[0] for flag in flags.split()}
