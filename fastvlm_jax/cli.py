"""The commands of `fastvlm`: flags in, one call, exit status out."""

import json
import logging
import os
import pathlib
import sys

from absl import flags
from absl import logging as absl_logging

from fastvlm_jax import xla_flags

USAGE = """usage: fastvlm COMMAND [--flag=value ...]      (fastvlm COMMAND --help lists the flags)

  train     --config FILE.py[:ARG] --workdir DIR [--profile FIRST:LAST] [--config.KEY=VALUE ...]
            [--coordinator_address HOST:PORT --num_processes N --process_id I]
  generate  --model DIR --image FILE --prompt TEXT [--max_tokens N] [--temperature T] [--top_p P]
  evaluate  --model DIR --benchmark easy-vqa --data DIR [--limit N] [--output FILE.json]
  convert   --source DIR --target DIR --layout native|hf|llava|timm|openclip [--dtype D] [--fold] [--overwrite]
  data      write --source PATH --output DIR [--images DIR] [--validation_share S] [--max_side N] [--verify]
            inspect --data DIR | --config FILE.py[:ARG] [--output FILE.html] [--samples N] [--json FILE] [--verify]
            easy-vqa --output DIR
  preflight --config FILE.py[:ARG] --topology v5e:4x4 [--mode train|encoder|generate] [--search] [--output FILE.json]
  bench     input --config FILE.py[:ARG] --config.data.path=DIR [--seconds N] [--output FILE.json]
  report    WORKDIR [WORKDIR ...] --output FILE.html [--model DIR --data DIR]

--model, --source and --config.parent take a training workdir, one checkpoint in it, a model directory of any layout, a
GGUF file, or parts of a model from several places: vision=DIR,llm=DIR[,projector=DIR]."""


def train(argv: list[str]) -> None:
    """fastvlm train"""
    xla_flags.apply()  # before the config file, which may import jax
    from ml_collections import config_flags

    fv = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file, FILE.py or FILE.py:ARG", flag_values=fv, sys_argv=argv
    )
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


def generate(argv: list[str]) -> None:
    """fastvlm generate"""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to ask", flag_values=fv)
    flags.DEFINE_multi_string("image", [], "image file; repeat it for several", flag_values=fv)
    flags.DEFINE_multi_string(
        "prompt", None, "question; repeat it for several, each about its image or the one image", flag_values=fv
    )
    flags.DEFINE_integer("max_tokens", 256, "longest answer, tokens", flag_values=fv)
    flags.DEFINE_float("temperature", 0.0, "0 = greedy", flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "probability mass to draw from", flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=fv)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"], "of parameters and computation", flag_values=fv
    )
    flags.DEFINE_integer("max_length", 8192, "context: tokens of prompt, image and answer", flag_values=fv)
    parse(fv, argv, required=("model", "prompt"))
    import fastvlm_jax
    from fastvlm_jax.generate import generate

    model, variables, processor = fastvlm_jax.load(fv.model, fv.dtype)
    answers = generate(
        model, variables, processor, fv.image, fv.prompt, max_tokens=fv.max_tokens, temperature=fv.temperature,
        top_p=fv.top_p, seed=fv.seed, max_length=fv.max_length,
    )  # fmt: skip
    print("\n".join(answers))


def evaluate(argv: list[str]) -> None:
    """fastvlm evaluate"""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to score", flag_values=fv)
    flags.DEFINE_enum("benchmark", "easy-vqa", ["easy-vqa"], "what to score it on", flag_values=fv)
    flags.DEFINE_string("data", None, "folder of the benchmark", flag_values=fv)
    flags.DEFINE_integer("limit", None, "questions to ask; all by default", lower_bound=1, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for the summary", flag_values=fv)
    parse(fv, argv, required=("model", "data"))
    import tqdm

    import fastvlm_jax
    from fastvlm_jax.evaluate.benchmarks import easy_vqa

    total = easy_vqa.count_questions(fv.data, fv.limit)
    model, variables, processor = fastvlm_jax.load(fv.model)
    with tqdm.tqdm(total=total, desc="evaluate", unit="question", disable=not sys.stderr.isatty()) as bar:
        summary, _ = easy_vqa.evaluate(model, variables, processor, fv.data, limit=fv.limit, progress=bar.update)
    print(write_json({"model": fv.model, **summary}, fv.output))


def convert(argv: list[str]) -> None:
    """fastvlm convert"""
    fv = flags.FlagValues()
    flags.DEFINE_string("source", None, "model to convert, or parts of it; layouts are recognised", flag_values=fv)
    flags.DEFINE_string("target", None, "folder to write", flag_values=fv)
    flags.DEFINE_enum(
        "layout", "native", ["native", "hf", "llava", "timm", "openclip"], "layout to write", flag_values=fv
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "of the stored weights; as they are by default",
        flag_values=fv,
    )
    flags.DEFINE_bool("fold", False, "fold the encoder's training form (hf and llava always do)", flag_values=fv)
    flags.DEFINE_bool("overwrite", False, "replace a model that is there", flag_values=fv)
    parse(fv, argv, required=("source", "target"))
    from fastvlm_jax import convert, model_io

    target = pathlib.Path(fv.target).expanduser().resolve()
    for path in fv.source.split(","):
        if pathlib.Path(path.rpartition("=")[2]).expanduser().resolve() == target:
            raise ValueError(f"--target {fv.target} is the source: name another folder")
    loaded = model_io.read(fv.source)
    convert.write(
        fv.target, fv.layout, loaded.variables, loaded.config, loaded.processor, loaded.lineage,
        dtype=fv.dtype, fold=fv.fold, overwrite=fv.overwrite,
    )  # fmt: skip
    print(f"wrote {fv.target} ({fv.layout})")


def data(argv: list[str]) -> None:
    """fastvlm data"""
    commands = {"write": write_data, "inspect": inspect_data, "easy-vqa": easy_vqa_data}
    if len(argv) < 2 or argv[1] not in commands:
        if {"--help", "-h"} & set(argv):
            print(USAGE)
            raise SystemExit(0)
        given = argv[1] if len(argv) > 1 else ""
        raise ValueError(f"unknown command {given!r}: `fastvlm data` has {', '.join(commands)}")
    commands[argv[1]](argv[1:])


def write_data(argv: list[str]) -> None:
    """fastvlm data write"""
    from fastvlm_jax.data import readers

    fv = flags.FlagValues()
    flags.DEFINE_string("source", None, "file or folder to read, local or gs://", flag_values=fv)
    flags.DEFINE_string("output", None, "folder for the shards", flag_values=fv)
    flags.DEFINE_enum("format", "auto", ["auto", *readers.READERS], "of the source", flag_values=fv)
    flags.DEFINE_string("images", "", "folder that image names in the source start from", flag_values=fv)
    flags.DEFINE_string("questions", None, "text file, a question a line: asked about captions", flag_values=fv)
    flags.DEFINE_string("split", "train", "that the records go to", flag_values=fv)
    flags.DEFINE_string("source_split", None, "of a source that has several; --split by default", flag_values=fv)
    flags.DEFINE_float("validation_share", 0.0, "of the records, to the split validation", flag_values=fv)
    flags.DEFINE_integer("max_side", 0, "shrink larger images to this side, pixels; 0 = none", flag_values=fv)
    flags.DEFINE_integer("quality", 92, "of JPEGs that are shrunk", flag_values=fv)
    flags.DEFINE_integer("shard_mb", 256, "size of a shard, MB", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("workers", 0, "processes; 0 = one a core", lower_bound=0, flag_values=fv)
    define_tokenizer(fv)
    flags.DEFINE_bool("verify", False, "decode every image in full", flag_values=fv)
    flags.DEFINE_bool("overwrite", False, "replace what is there of another source or settings", flag_values=fv)
    parse(fv, argv, required=("source", "output"))
    from fastvlm_jax.data import write
    from fastvlm_jax.data.write import progress

    settings = write.Settings(
        split=fv.split, validation_share=fv.validation_share, max_side=fv.max_side, quality=fv.quality,
        verify=fv.verify, shard_bytes=fv.shard_mb << 20, tokenizer=fv.tokenizer, template=fv.template,
        turns=fv.turns,
    )  # fmt: skip
    questions = write.read_questions(fv.questions) if fv.questions else ()
    options = readers.Options(images=fv.images, questions=questions, split=fv.source_split or fv.split)
    with progress.shown() as show:
        summary = write.write(
            fv.source, fv.output, format=fv.format, options=options, settings=settings, workers=fv.workers,
            overwrite=fv.overwrite, progress=show,
        )  # fmt: skip
    print(summary.describe(fv.output))


def inspect_data(argv: list[str]) -> None:
    """fastvlm data inspect"""
    from ml_collections import config_flags

    fv = flags.FlagValues()
    flags.DEFINE_string("data", None, "folder of shards; with a config, in the place of its data", flag_values=fv)
    config_flags.DEFINE_config_file("config", None, "of a run: tells what it makes of the data", flag_values=fv)
    flags.DEFINE_string("split", "train", "to look at", flag_values=fv)
    flags.DEFINE_bool("verify", False, "compare the checksums of all shards", flag_values=fv)
    flags.DEFINE_string("output", "", "HTML file with samples as the model sees them", flag_values=fv)
    flags.DEFINE_integer("samples", 16, "shown in the HTML file", lower_bound=0, flag_values=fv)
    flags.DEFINE_string("json", "", "file for all numbers", flag_values=fv)
    flags.DEFINE_string(
        "list_unusable", "", "file for the records that the run cannot use; beside the HTML file", flag_values=fv
    )
    parse(fv, argv)
    if not fv.config and not fv.data:
        raise ValueError("--data is missing: name a folder of shards, or the --config of a run")
    from fastvlm_jax.data.inspect import Outputs, inspect, inspect_run

    outputs = Outputs(fv.output, fv.json, fv.list_unusable, fv.samples)
    if fv.config:
        print(inspect_run(fv.config, fv.data, fv.split, fv.verify, outputs))
    else:
        print(inspect(fv.data, fv.split, fv.verify, outputs))


def easy_vqa_data(argv: list[str]) -> None:
    """fastvlm data easy-vqa"""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "folder for the shards", flag_values=fv)
    parse(fv, argv, required=("output",))
    from fastvlm_jax.data.sets.easy_vqa import write_easy_vqa

    print(f"{fv.output}: {write_easy_vqa(fv.output)}")


def define_tokenizer(fv: flags.FlagValues) -> None:
    """The flags that tell how texts become tokens."""
    flags.DEFINE_string("tokenizer", "", "file or folder; with it tokens are counted for the index", flag_values=fv)
    flags.DEFINE_string("template", "qwen_2", "of conversations, as data.template in configs", flag_values=fv)
    flags.DEFINE_string("turns", "conversation", "conversation or separate, as data.turns", flag_values=fv)


def bench(argv: list[str]) -> None:
    """fastvlm bench"""
    if len(argv) < 2 or argv[1] != "input":
        if {"--help", "-h"} & set(argv):
            print(USAGE)
            raise SystemExit(0)
        raise ValueError(f"unknown command {(argv[1] if len(argv) > 1 else '')!r}: `fastvlm bench` has input")
    from ml_collections import config_flags

    fv, argv = flags.FlagValues(), argv[1:]
    config_flags.DEFINE_config_file(
        "config", None, "config file, FILE.py or FILE.py:ARG", flag_values=fv, sys_argv=argv
    )
    flags.DEFINE_float("seconds", 20.0, "that each contestant is timed for", lower_bound=0.1, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for the result", flag_values=fv)
    parse(fv, argv, required=("config",))
    from fastvlm_jax import config as config_lib
    from fastvlm_jax import model_io, sharding
    from fastvlm_jax.bench.input import bench_input, describe
    from fastvlm_jax.models import fastvlm
    from fastvlm_jax.stage import make_processor

    config = fv.config
    config_lib.validate(config)
    parent = model_io.read(config.parent) if config.parent and not config.data.tokenizer else None
    processor = make_processor(config, fastvlm.build(**config.model.to_dict()), parent)
    batches = sharding.batch_sharding(sharding.make_mesh(config.mesh))
    found = bench_input(config, processor, batches, fv.seconds)
    write_json(found, fv.output)
    print(describe(found))


def preflight(argv: list[str]) -> None:
    """fastvlm preflight"""
    from fastvlm_jax.preflight import topology

    topology.set_environment()  # before the config file, which may touch devices
    from ml_collections import config_flags

    fv = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file, FILE.py or FILE.py:ARG", flag_values=fv, sys_argv=argv
    )
    flags.DEFINE_string("topology", None, "slices, as v5e:4x4, v5p:4x4x4 or, two of them, v5e:16x16*2", flag_values=fv)
    flags.DEFINE_enum("mode", "train", ["train", "encoder", "generate"], "what to compile", flag_values=fv)
    flags.DEFINE_bool("search", False, "rank meshes, remat, groups and accumulation; compile the best", flag_values=fv)
    flags.DEFINE_integer("records", None, "of the stage's data, for its hours", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("top", 10, "costly operations to list", lower_bound=0, flag_values=fv)
    flags.DEFINE_integer("rows", 1, "of generation and encoder: images at a time", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("prompt_tokens", 64, "of generation: tokens of text", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("max_tokens", 256, "of generation: tokens to write", lower_bound=2, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file for all numbers", flag_values=fv)
    parse(fv, argv, required=("config", "topology"))
    from fastvlm_jax.preflight import run

    options = run.Options(fv.mode, fv.records, fv.top, fv.rows, fv.prompt_tokens, fv.max_tokens)
    found = (run.search if fv.search else run.preflight)(fv.config, fv.topology, options)
    write_json(found, fv.output)
    print(run.text(found))
    if not found["memory"]["fits"]:
        raise SystemExit(1)


def report(argv: list[str]) -> None:
    """fastvlm report"""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "HTML file; its pictures are written beside it", flag_values=fv)
    flags.DEFINE_string("model", None, "model for a sheet of answered test questions", flag_values=fv)
    flags.DEFINE_string("data", None, "folder of the questions", flag_values=fv)
    workdirs = parse(fv, argv, required=("output",), positional="WORKDIR")
    from fastvlm_jax.report.runs import write_report

    for path in write_report([pathlib.Path(w) for w in workdirs], pathlib.Path(fv.output), fv.model, fv.data):
        print(path)


COMMANDS = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "convert": convert,
    "data": data,
    "bench": bench,
    "preflight": preflight,
    "report": report,
}


def write_json(content: dict, path: str | None) -> str:
    """Returns `content` as JSON, written to `path` if there is one."""
    text = json.dumps(content, indent=2)
    if path:
        output = pathlib.Path(path).expanduser()
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(output.name + ".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, output)
    return text


def parse(fv: flags.FlagValues, argv: list[str], required: tuple[str, ...] = (), positional: str = "") -> list[str]:
    """Parses the flags of a command and returns its positional arguments."""
    if {"--help", "-h"} & set(argv):
        print(f"{USAGE}\n\nflags:{fv.get_help()}")
        raise SystemExit(0)
    try:
        rest = fv(argv)[1:]
    except (AttributeError, KeyError, TypeError) as error:  # a key that the config does not have, or of another type
        raise ValueError(f"--config: {str(error).strip().splitlines()[0]}") from error
    if rest and not positional:
        raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    if positional and not rest:
        raise ValueError(f"name at least one {positional}")
    for name in required:
        if fv[name].value in (None, []):
            raise ValueError(f"--{name} is missing")
    return rest


def main() -> None:
    """Runs the command; what a user can cause ends in one line on stderr and exit status 1 (2 for wrong usage)."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)
    flags.FLAGS.mark_as_parsed()  # the commands parse their own; absl's would make every log begin with a warning
    logging.getLogger("jax").setLevel(logging.ERROR)
    xla_flags.silence_libtpu()
    argv = sys.argv[1:]
    if not argv or argv[0] not in COMMANDS:
        print(USAGE, file=sys.stdout if argv and argv[0] in ("--help", "-h", "help") else sys.stderr)
        raise SystemExit(0 if argv and argv[0] in ("--help", "-h", "help") else 2)
    try:
        COMMANDS[argv[0]](argv)
    except KeyboardInterrupt as stop:
        print(f"fastvlm {argv[0]}: {str(stop) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except (flags.Error, ValueError, OSError, FloatingPointError, RuntimeError) as error:
        full = "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, RuntimeError) and not full:
            raise
        if os.environ.get("FASTVLM_TRACEBACK"):
            raise
        message = str(error).strip()
        if "Traceback" in message:  # an error in a config file, which the flag library quotes whole
            message = message.splitlines()[-1]
        if full:
            message = (
                f"a device's memory is too small ({message.splitlines()[0][:200]}); a larger accumulate, remat, or a "
                "slice with more chips: fastvlm preflight tells what fits"
            )
        print(f"fastvlm {argv[0]}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, flags.Error) else 1) from None
