"""Runs `fastvlm bench`: benchmarks of this machine."""

from absl import flags

from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import define_config, parse, to_json


def bench(argv: list[str]) -> None:
    """Times the training input of a config against other ways to read the same images."""
    name = help.choose("fastvlm bench", argv[1:], ("input",), help.group("bench"))
    fv, argv = flags.FlagValues(), [f"bench {name}", *argv[2:]]
    define_config(fv, argv)
    flags.DEFINE_float("seconds", 20.0, "time that each contestant runs for, s", lower_bound=0.1, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for the result", flag_values=fv)
    parse(fv, argv, required=("config",))
    from fastvlm_jax import sharding
    from fastvlm_jax.bench.input import bench_input, describe
    from fastvlm_jax.stage import open_processor

    config = fv.config
    processor = open_processor(config)
    batches = sharding.batch_sharding(sharding.make_mesh(config.mesh))
    found = bench_input(config, processor, batches, fv.seconds)
    to_json(found, fv.output)
    print(describe(found))
