"""`fastvlm data`: data sets written, inspected, made."""

from absl import flags

from fastvlm_jax.cli.arguments import USAGE, define_config, parse


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
    fv = flags.FlagValues()
    flags.DEFINE_string("data", None, "folder of shards; with a config, in the place of its data", flag_values=fv)
    define_config(fv, argv, "of a run: tells what it makes of the data")
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
        from fastvlm_jax.stage import open_builder

        if fv.data:
            fv.config.data.path = fv.data
        build = open_builder(fv.config, fv.split)
        print(inspect_run(build, fv.config.data.images_per_group, fv.verify, outputs))
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
