"""`fastvlm train`: one training run."""

import pathlib

from absl import flags

from fastvlm_jax import xla_flags
from fastvlm_jax.cli.arguments import define_config, parse


def train(argv: list[str]) -> None:
    """fastvlm train"""
    xla_flags.apply()  # before the config file, which may import jax
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_string("workdir", None, "where metrics and checkpoints go", flag_values=fv)
    flags.DEFINE_string("coordinator_address", None, "of several processes: HOST:PORT of process 0", flag_values=fv)
    flags.DEFINE_integer("num_processes", None, "of the run; what the platform says by default", flag_values=fv)
    flags.DEFINE_integer("process_id", None, "of this process, from 0", flag_values=fv)
    flags.DEFINE_float("heartbeat_seconds", None, "of silence that a process is given; 30 by default", flag_values=fv)
    flags.DEFINE_float(
        "initialization_seconds", None, "that all processes are waited for; 300 by default", flag_values=fv
    )
    flags.DEFINE_string("profile", "", "steps to trace for xprof or TensorBoard, as 10:13", flag_values=fv)
    parse(fv, argv, required=("config", "workdir"))
    if "://" in fv.workdir:
        raise ValueError(f"--workdir {fv.workdir} must be a folder: mount the bucket, as docs/tpu.md tells")
    from fastvlm_jax import distributed

    settings = distributed.find_settings(
        fv.coordinator_address, fv.num_processes, fv.process_id, fv.heartbeat_seconds, fv.initialization_seconds
    )
    with distributed.started(settings):
        from fastvlm_jax.train import train

        train(fv.config, pathlib.Path(fv.workdir).expanduser(), profile=fv.profile)
