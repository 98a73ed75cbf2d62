"""Runs `fastvlm train`: one training run."""

import pathlib

from absl import flags

from fastvlm_jax import xla_flags
from fastvlm_jax.cli.arguments import define_config, parse


def train(argv: list[str]) -> None:
    """Trains the stage of a config in a workdir, or resumes the run that the workdir holds."""
    xla_flags.apply()  # before the config file, which may import jax
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_string("workdir", None, "folder for metrics and checkpoints", flag_values=fv)
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, in a job of several processes", flag_values=fv
    )
    flags.DEFINE_integer(
        "num_processes", None, "processes of the job; default: as many as the platform reports", flag_values=fv
    )
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=fv)
    flags.DEFINE_float(
        "heartbeat_seconds", None, "silence after which a process counts as frozen, s; default 30", flag_values=fv
    )
    flags.DEFINE_float(
        "initialization_seconds", None, "longest wait for all processes to start, s; default 300", flag_values=fv
    )
    flags.DEFINE_string("profile", "", "steps to trace for xprof or TensorBoard, as 10:13", flag_values=fv)
    parse(fv, argv, required=("config", "workdir"))
    if "://" in fv.workdir:
        raise ValueError(f"--workdir {fv.workdir} must be a folder: mount the bucket, see docs/tpu.md")
    from fastvlm_jax import distributed

    settings = distributed.find_settings(
        fv.coordinator_address, fv.num_processes, fv.process_id, fv.heartbeat_seconds, fv.initialization_seconds
    )
    with distributed.started(settings):
        from fastvlm_jax.train import train

        train(fv.config, pathlib.Path(fv.workdir).expanduser(), profile=fv.profile)
