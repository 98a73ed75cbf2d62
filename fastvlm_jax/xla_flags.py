"""Sets the compilers' flags, each with its reason and source; no other file sets any.

`apply()` puts the flags into the environment of `fastvlm train` before jax is imported. `compiler_options()` returns
those for TPU for a single compilation, as preflight needs. Flags that the user has set in the environment stand, and
CPUs get none.

These flags were tried and left out, for they change nothing. Of an FSDP step of four scanned layers for v5e:2x2, libtpu
0.0.52 compiles the same program, to the instruction, with and without --xla_enable_async_all_gather, ..._all_reduce,
..._reduce_scatter_fusion, --xla_tpu_enable_async_collective_fusion_fuse_{all_gather,all_reduce,reduce_scatter},
..._multiple_steps, --xla_tpu_overlap_compute_collective_tc, --xla_tpu_enable_ag_backward_pipelining and
--xla_latency_hiding_scheduler_rerun=2 (MaxText's list, benchmarks/xla_flags_library.py); for two slices, also with and
without --xla_tpu_enable_data_parallel_all_reduce_opt and --xla_tpu_data_parallel_opt_different_sized_ops. With
--xla_tpu_scoped_vmem_limit_kib=65536 temporaries take half as much memory again, and the estimated cycles stay.
"""

import glob
import importlib.util
import os
from collections.abc import MutableMapping

# These two run collectives beside the computation. libtpu 0.0.52 does so by default; setting them makes another libtpu
# train the program that preflight compiled. In that step two of the four gathers of weights are then fused, in pieces,
# with a matrix product; with either flag off all four stand alone (and temporaries take 68 MB, not 101). Source:
# MaxText's list, and the compiled program.
TPU = {
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    # Below this many MiB no product is cut into pieces with a collective-permute each (a windowed einsum). Meant for
    # large weights, the compiler chooses it for the encoder's small ones on 16 chips: pieces of 48 columns for units of
    # 128, each of which reads all activations again. Stage 2, 0.5B with 2 layers, v5e:4x4, without and with this flag:
    # encoder 573 and 463 ms (estimated), FLOPs 1.20 and 1.01 times the model's. The 7B step for v5e:8x8 has none.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
# XLA leaves this off by default (xla/debug_options_flags.cc). NVIDIA sets it in its JAX images: collectives are then
# scheduled beside kernels (https://docs.nvidia.com/jax-toolbox/environment-variables).
GPU = {"xla_gpu_enable_latency_hiding_scheduler": "true"}
# Keeps libtpu from looking for a TPU, and from warning that there is none.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
VARIABLES = {"tpu": ("LIBTPU_INIT_ARGS", TPU), "gpu": ("XLA_FLAGS", GPU)}


def compiler_options(platform: str) -> dict[str, str]:
    """Returns a platform's flags that the environment does not set, for `Lowered.compile(compiler_options=...)`."""
    if platform not in VARIABLES:
        return {}
    variable, flags = VARIABLES[platform]
    return {name: value for name, value in flags.items() if f"--{name}" not in _names(os.environ.get(variable, ""))}


def apply(environment: MutableMapping[str, str] = os.environ, platform: str | None = None) -> None:
    """Adds the flags of `platform` (default: this machine's) to the environment. Call it before jax is imported."""
    platform = platform or find_platform(environment)
    if platform in VARIABLES:
        variable, flags = VARIABLES[platform]
        given = environment.get(variable, "")
        missing = [f"--{name}={value}" for name, value in flags.items() if f"--{name}" not in _names(given)]
        environment[variable] = " ".join([given, *missing]).strip()


def silence_compiler(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps XLA from printing to the terminal that a compilation is slow and how to file a bug; errors still raise.

    XLA logs those alarms (xla/service/slow_operation_alarm.cc) as errors and has no flag of their own for them.
    Call it before jax is imported; TF_CPP_MIN_LOG_LEVEL=0 in the environment brings all lines back.
    """
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def silence_libtpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Silences the ten lines that libtpu prints at every start on a machine without a TPU."""
    if find_platform(environment) != "tpu":
        for name, value in NO_TPU.items():
            environment.setdefault(name, value)


def find_platform(environment: MutableMapping[str, str]) -> str:
    """Returns "tpu", "gpu" or "cpu": the first of JAX_PLATFORMS, else by the machine's device files."""
    chosen = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if chosen:
        return {"cuda": "gpu"}.get(chosen, chosen)
    if importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return "tpu"
    return "gpu" if glob.glob("/dev/nvidia[0-9]*") else "cpu"


def _names(flags: str) -> set[str]:
    return {flag.partition("=")[0] for flag in flags.split()}
