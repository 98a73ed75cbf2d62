"""Runs `fastvlm bench`: benchmarks of this machine."""

import functools
import os
import pathlib

from absl import flags

from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import define_config, parse, to_json


def bench(argv: list[str]) -> None:
    """Runs the benchmark that is named."""
    name = help.choose("fastvlm bench", argv[1:], BENCHMARKS, help.group("bench"))
    BENCHMARKS[name]([f"bench {name}", *argv[2:]])


def bench_input(argv: list[str]) -> None:
    """Times the training input of a config against other ways to read the same images."""
    fv = flags.FlagValues()
    define_config(fv, argv)
    flags.DEFINE_float("seconds", 20.0, "time that each contestant runs for, s", lower_bound=0.1, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for the result", flag_values=fv)
    parse(fv, argv, required=("config",))
    from fastvlm_jax import sharding
    from fastvlm_jax.bench.input import bench_input, describe
    from fastvlm_jax.bench.pairs import bench_pairs
    from fastvlm_jax.stage import open_processor

    config = fv.config
    processor = open_processor(config)
    batches = sharding.batch_sharding(sharding.make_mesh(config.mesh))
    time = bench_pairs if "text" in config.model else bench_input
    found = time(config, processor, batches, fv.seconds)
    to_json(found, fv.output)
    print(describe(found))


def bench_ttft(argv: list[str]) -> None:
    """Times the first token of an answer, part by part, or estimates it for a TPU."""
    if any(flag.lstrip("-").startswith("topology") for flag in argv) and not help.asks_help(argv):
        from fastvlm_jax.preflight import topology

        topology.set_environment()  # before the config file, which may touch devices
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to time; or --config", flag_values=fv)
    define_config(fv, argv, "config file whose model to time with random weights, FILE.py or FILE.py:SIZE")
    flags.DEFINE_string(
        "image_size",
        None,
        "sides of the image in pixels, as 256,512,1024; 1024:2x2 = an overview and 2 x 2 tiles of 1024 px (AnyRes); "
        "default: the model's",
        flag_values=fv,
    )
    flags.DEFINE_integer("prompt_tokens", 64, "tokens of text in a prompt", lower_bound=1, flag_values=fv)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "dtype of parameters and computation; default: bfloat16, on a CPU float32",
        flag_values=fv,
    )
    flags.DEFINE_integer("batch", 1, "prompts at a time, each about an image of its own", lower_bound=1, flag_values=fv)
    _define_clock(fv)
    flags.DEFINE_string(
        "topology", None, "estimate the times on one chip of a TPU slice instead, as v5e:1x1 or v5p:2x2x1",
        flag_values=fv,
    )  # fmt: skip
    parse(fv, argv)
    _check_clock(fv)
    if (fv.model is None) == (fv.config is None):
        raise flags.Error("name the model by either --model=DIR or --config=FILE.py:SIZE")
    if fv.topology and fv.against:
        raise flags.Error("--against needs a device to run on: leave out --topology, which only estimates")
    from fastvlm_jax.bench import first_token, ttft, ttft_model, ttft_page

    dtype = fv.dtype or ttft_model.default_dtype(fv.topology)
    given = (fv.model, ttft_model.of_source) if fv.model else (fv.config, ttft_model.of_config)
    subject = given[1](given[0], dtype, shapes_only=bool(fv.topology))
    found: dict[str, list] = {"points": [], "against": []}
    for question in first_token.questions(subject.model, fv.image_size, subject.sizes, fv.prompt_tokens, fv.batch):
        if fv.topology:
            from fastvlm_jax.preflight.ttft import estimate

            point, others = estimate(subject.model, fv.topology, question), []
        else:
            against = [fv.against] if fv.against else []
            point, others = ttft.measure(subject, question, runs=fv.runs, warmup=fv.warmup, against=against)
        found["points"].append(point)
        found["against"] += others
        if fv.output:  # after each point, so that a run that is stopped leaves what it has
            ttft_page.write(pathlib.Path(fv.output).expanduser(), found)
    print(ttft_page.text(found))


def bench_step(argv: list[str]) -> None:
    """Times a training step of a config by parts, with random weights, pixels and tokens."""
    fv = flags.FlagValues()
    define_config(fv, argv)
    _define_clock(fv)
    parse(fv, argv, required=("config",))
    _check_clock(fv)
    from fastvlm_jax.bench import step, step_page
    from fastvlm_jax.bench.page import write_beside

    others = None
    if fv.against:
        from fastvlm_jax.bench.step_transformers import prepare

        others = functools.partial(prepare, fv.config)
    found = step.measure(fv.config, runs=fv.runs, warmup=fv.warmup, others=others)
    if fv.output:
        to_json(found, fv.output)
        path = pathlib.Path(fv.output).expanduser()
        write_beside(path, step_page.text(found), step_page.bars(found), step_page.title(found))
    print(step_page.text(found))


def bench_kernels(argv: list[str]) -> None:
    """Times the forms of the encoder's functions on this machine, or compares them for a TPU by its compiler."""
    fv = flags.FlagValues()
    flags.DEFINE_string(
        "topology", None, "compare the TPU kernels with XLA's forms instead, by the TPU compiler, as v5e:1x1",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer("rows", 8, "images at a time, with --topology", lower_bound=1, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for all numbers, with --topology", flag_values=fv)
    parse(fv, argv)
    if fv.topology is None:
        if unfit := [name for name in ("rows", "output") if fv[name].present]:
            raise flags.Error(f"--{unfit[0]} is for --topology: leave it out, or name a TPU, as --topology=v5e:1x1")
        from fastvlm_jax.bench import kernels

        kernels.main()
        return
    from fastvlm_jax.preflight import bench_kernels, topology

    topology.set_environment()
    found = bench_kernels.measure(fv.topology, fv.rows)
    to_json(found, fv.output)
    print(bench_kernels.text(found))


def _define_clock(fv: flags.FlagValues) -> None:
    """Defines the flags that `bench ttft` and `bench step` have in common."""
    flags.DEFINE_integer("runs", 20, "runs on the clock", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("warmup", 3, "runs before the clock starts", lower_bound=1, flag_values=fv)
    flags.DEFINE_enum(
        "against", None, ["transformers"], "time the same there too, in turns with this package", flag_values=fv
    )
    flags.DEFINE_string("output", None, "JSON file; FILE.md, FILE.svg and FILE.png are written too", flag_values=fv)


def _check_clock(fv: flags.FlagValues) -> None:
    """Refuses an --output that its own table would replace; leaves memory of a GPU to what is timed --against."""
    if fv.output and not fv.output.endswith(".json"):
        raise flags.Error(f"--output={fv.output} must end in .json: tables and pictures are written beside it")
    if fv.against:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of a GPU's memory


BENCHMARKS = {"input": bench_input, "step": bench_step, "ttft": bench_ttft, "kernels": bench_kernels}
