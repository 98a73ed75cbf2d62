"""Runs `fastvlm sweep`: a grid of models, trained, scored and timed."""

import pathlib
import re
import sys

from absl import flags

from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import define_config, parse

LAUNCHERS = ("tpu", "gke", "slurm", "local")  # scripts of launch/
# Flag -> the one without which it says nothing.
NEEDS = {"topology": "dry_run", "estimate": "topology", "settings": "launcher", "ttft_settings": "launcher"}


def sweep(argv: list[str]) -> None:
    """Runs what is not finished of a grid of points, or tells what it would run; exits with 1 if a point failed."""
    asks_help = help.asks_help(argv)
    dry = not asks_help and any(re.fullmatch("--?dry_run(=true)?", word) for word in argv)
    if not asks_help:
        import jax

        jax.config.update("jax_platforms", "cpu")  # devices belong to the commands that a sweep starts
    if dry:
        from fastvlm_jax.preflight import topology

        topology.set_environment()  # before the config file, which may touch devices
    fv = flags.FlagValues()
    define(fv, argv)
    parse(fv, argv, required=("config",) if dry else ("config", "workdir"))
    for name, other in NEEDS.items():
        if fv[name].present and not fv[other].value:
            raise flags.Error(f"--{name} says nothing without --{other}: add --{other}")
    if "://" in (fv.workdir or ""):
        raise ValueError(
            f"--workdir {fv.workdir} must be a folder of this machine: --remote {fv.workdir} holds the runs"
        )
    from fastvlm_jax.report.sweep_results import RESULTS
    from fastvlm_jax.sweep import checks, dry_run, launcher, plan, run, state

    workdir = pathlib.Path(fv.workdir or "WORKDIR").expanduser()
    place = fv.remote.rstrip("/") or str(workdir)
    made = plan.make_plan(fv.config, place)
    if fv.dry_run:
        print(dry_run.describe(made, fv.topology, fv.estimate))
        return
    settings = fv.settings or ("launch/settings/local.env" if fv.launcher == "local" else "")
    ttft_settings = fv.ttft_settings or (settings if fv.launcher == "local" else "")
    where = launcher.Launcher(fv.launcher or "", settings, ttft_settings)
    launcher.check(where, place)
    checks.check(made, here=fv.launcher not in ("tpu", "gke") and "://" not in place)

    def tell(line: str) -> None:
        print(f"sweep: {line}", file=sys.stderr, flush=True)

    with state.locked(workdir) as lock:
        if not fv.remote:  # where new answers replace those before
            for line in state.set_aside(workdir, made):
                tell(line)
        state.write_plan(workdir, made)
        failed = run.run(made, workdir, place, where, lock, tell)
    print(workdir / RESULTS)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(made.points)} points failed: {', '.join(failed)}; the lines above and results.json "
            "say why, and the same command tries them again"
        )


def define(fv: flags.FlagValues, argv: list[str]) -> None:
    """Defines the flags of the command."""
    define_config(fv, argv, "the grid, FILE.py or FILE.py:SETUP, as configs/resolution_scaling.py:paper-fig1")
    flags.DEFINE_string("workdir", None, "folder for the state, the runs and results.json", flag_values=fv)
    flags.DEFINE_bool("dry_run", False, "tell the points, their tokens and all runs, and do nothing", flag_values=fv)
    flags.DEFINE_string(
        "topology", None, "with --dry_run: TPU slice to estimate chip-hours for, as v5e:4x4", flag_values=fv
    )
    flags.DEFINE_enum(
        "estimate", "arithmetic", ["arithmetic", "compiler"],
        "with --topology: arithmetic takes seconds, the TPU compiler minutes for each full-size run", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_enum(
        "launcher", None, LAUNCHERS, "script of launch/ that runs each command; default: this machine, one by one",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string("settings", "", "settings file of the launcher, as launch/settings/tpu.env", flag_values=fv)
    flags.DEFINE_string(
        "ttft_settings", "", "settings file of the launcher for timing: one chip; without it nothing is timed there",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "remote", "", "gs://BUCKET/DIR for runs and points, where the launcher's machines share no disk with this one",
        flag_values=fv,
    )  # fmt: skip
