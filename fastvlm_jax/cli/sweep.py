"""Runs `fastvlm sweep`: a grid of models, trained, scored and timed."""

import pathlib
import sys

from absl import flags

from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import define_config, parse

LAUNCHERS = ("tpu", "gke", "slurm", "local")  # scripts of launch/
NEEDS_DRY_RUN = ("topology", "estimate")


def sweep(argv: list[str]) -> None:
    """Runs what is not finished of a grid of points, or tells what it would run; exits with 1 if a point failed."""
    dry = not help.asks_help(argv) and any(word.lstrip("-").partition("=")[0] == "dry_run" for word in argv)
    if not help.asks_help(argv):
        import jax

        jax.config.update("jax_platforms", "cpu")  # devices belong to the commands that a sweep starts
    if dry:
        from fastvlm_jax.preflight import topology

        topology.set_environment()  # before the config file, which may touch devices
    fv = flags.FlagValues()
    define(fv, argv)
    parse(fv, argv, required=("config",) if dry else ("config", "workdir"))
    for name in NEEDS_DRY_RUN:
        if fv[name].present and not fv.dry_run:
            raise flags.Error(f"--{name} estimates what a sweep takes: add --dry_run")
    from fastvlm_jax.sweep import checks, dry_run, launcher, plan, run, state

    place = (fv.remote or fv.workdir or "WORKDIR").rstrip("/")
    if fv.dry_run:
        print(dry_run.describe(plan.make_plan(fv.config, place), fv.topology, fv.estimate))
        return
    if "://" in fv.workdir:
        raise ValueError(
            f"--workdir {fv.workdir} must be a folder of this machine: --remote {fv.workdir} holds the runs"
        )
    workdir = pathlib.Path(fv.workdir).expanduser()
    place = fv.remote.rstrip("/") if fv.remote else str(workdir)
    made = plan.make_plan(fv.config, place)
    settings = fv.settings or ("launch/settings/local.env" if fv.launcher == "local" else "")
    ttft_settings = fv.ttft_settings or (settings if fv.launcher == "local" else "")
    where = launcher.Launcher(fv.launcher or "", settings, ttft_settings)
    launcher.check(where, place)
    checks.check(made, here=fv.launcher not in ("tpu", "gke") and "://" not in place)

    def tell(line: str) -> None:
        print(f"sweep: {line}", file=sys.stderr, flush=True)

    with state.locked(workdir) as lock:
        for line in state.set_aside(workdir, made):
            tell(line)
        state.write_plan(workdir, made)
        failed = run.run(made, workdir, place, where, lock, tell)
    print(workdir / state.RESULTS)
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
