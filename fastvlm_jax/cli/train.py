"""Runs `fastvlm train`: one training run."""

import pathlib

from absl import flags

from fastvlm_jax import disk, xla_flags
from fastvlm_jax.cli.arguments import define_config, define_processes, parse, processes


def train(argv: list[str]) -> None:
    """Trains the stage of a config in a workdir, or resumes the run that the workdir holds."""
    xla_flags.apply()  # before the config file, which may import jax
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_string("workdir", None, "folder for metrics and checkpoints", flag_values=fv)
    define_processes(fv)
    flags.DEFINE_string("profile", "", "steps to trace for xprof or TensorBoard, as 10:13", flag_values=fv)
    flags.DEFINE_list(
        "allow_changes", [], "config keys that a resumed run may change though its results depend on them, as steps",
        flag_values=fv,
    )  # fmt: skip
    parse(fv, argv, required=("config", "workdir"))
    if "://" in fv.workdir:
        raise ValueError(f"--workdir {fv.workdir} must be a folder: mount the bucket, see docs/tpu.md")
    from fastvlm_jax import distributed

    try:
        with distributed.started(processes(fv)):
            from fastvlm_jax.train import train

            workdir = pathlib.Path(fv.workdir).expanduser()
            train(fv.config, workdir, profile=fv.profile, allow_changes=fv.allow_changes)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or disk.error_in(str(error)):
            raise
        from fastvlm_jax.preflight import too_small

        if advice := too_small.advice(fv.config):
            raise ValueError(
                f"a device's memory is too small ({str(error).splitlines()[0][:200]}): {advice}"
            ) from error
        raise
