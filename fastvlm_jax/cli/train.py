"""Runs `fastvlm train`: one training run."""

import pathlib

from absl import flags

from fastvlm_jax import xla_flags
from fastvlm_jax.cli.arguments import define_config, define_processes, parse, processes


def train(argv: list[str]) -> None:
    """Trains the stage of a config in a workdir, or resumes the run that the workdir holds."""
    xla_flags.apply()  # before the config file, which may import jax
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_string("workdir", None, "folder for metrics and checkpoints", flag_values=fv)
    define_processes(fv)
    flags.DEFINE_string("profile", "", "steps to trace for xprof or TensorBoard, as 10:13", flag_values=fv)
    parse(fv, argv, required=("config", "workdir"))
    if "://" in fv.workdir:
        raise ValueError(f"--workdir {fv.workdir} must be a folder: mount the bucket, see docs/tpu.md")
    from fastvlm_jax import distributed

    with distributed.started(processes(fv)):
        from fastvlm_jax.train import train

        train(fv.config, pathlib.Path(fv.workdir).expanduser(), profile=fv.profile)
