"""Runs `fastvlm preflight`: compiles the program of a config for a TPU slice, or does the arithmetic for GPUs."""

from absl import flags

from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import define_config, parse, to_json


def preflight(argv: list[str]) -> None:
    """Prints the TPU compiler's estimates for a config on a slice, or arithmetic for GPUs; exits with status 1 if the
    program does not fit.
    """
    if not help.asks_help(argv):
        from fastvlm_jax.preflight import topology

        topology.set_environment()  # before the config file, which may touch devices
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_string(
        "topology",
        None,
        "TPU slice, as v5e:4x4, v5p:4x4x4 or, of two, v5e:16x16*2; or gpu:80GB, gpu:8x80GB, cpu",
        flag_values=fv,
    )
    flags.DEFINE_enum("mode", "train", ["train", "encoder", "generate"], "program to compile", flag_values=fv)
    flags.DEFINE_bool("search", False, "rank meshes, remat, groups and accumulation; compile the best", flag_values=fv)
    flags.DEFINE_integer(
        "records", None, "records in the stage's data, to estimate its hours", lower_bound=1, flag_values=fv
    )
    flags.DEFINE_integer("top", 10, "number of costly operations to list", lower_bound=0, flag_values=fv)
    flags.DEFINE_integer("rows", 1, "images at a time, in modes generate and encoder", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer(
        "prompt_tokens", 64, "text tokens of a prompt, in mode generate", lower_bound=1, flag_values=fv
    )
    flags.DEFINE_integer("max_tokens", 256, "tokens to generate, in mode generate", lower_bound=2, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for all numbers", flag_values=fv)
    parse(fv, argv, required=("config", "topology"))
    from fastvlm_jax.preflight import gpu, run

    if gpu.is_arithmetic(fv.topology):
        if unfit := [name for name in ("mode", "search", "records", "rows") if fv[name].present]:
            raise flags.Error(f"--{unfit[0]} needs a compiler, which there is none of for GPUs and CPUs: leave it out")
        found = gpu.preflight(fv.config, fv.topology)
        to_json(found, fv.output)
        print(gpu.text(found))
        raise SystemExit(0 if found["memory"]["fits"] else 1)
    options = run.Options(fv.mode, fv.records, fv.top, fv.rows, fv.prompt_tokens, fv.max_tokens)
    found = (run.search if fv.search else run.preflight)(fv.config, fv.topology, options)
    to_json(found, fv.output)
    print(run.text(found))
    if not found["memory"]["fits"]:
        raise SystemExit(1)
