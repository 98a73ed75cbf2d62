"""Runs `fastvlm data`: writes, inspects and fetches data sets."""

import dataclasses
import pathlib
import sys

from absl import flags

from fastvlm_jax import xla_flags
from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import define_config, numbers, parse, to_json


def data(argv: list[str]) -> None:
    """Runs the command behind `fastvlm data`."""
    commands = {
        "write": write_data, "inspect": inspect_data, "easy-vqa": easy_vqa_data, "documents": documents_data,
        "icons": icons_data, "tokenizer": train_tokenizer, "reinforce": reinforce_data,
    }  # fmt: skip
    name = help.choose("fastvlm data", argv[1:], commands, help.group("data"))
    commands[name]([f"data {name}", *argv[2:]])


def write_data(argv: list[str]) -> None:
    """Writes a source of any format as shards, and prints how many records and rejected entries there are."""
    from fastvlm_jax.data.readers import Options, recognise

    fv = flags.FlagValues()
    flags.DEFINE_string("source", None, "file or folder to read, local or gs://", flag_values=fv)
    flags.DEFINE_string("output", None, "folder for the shards", flag_values=fv)
    flags.DEFINE_enum(
        "format", "auto", ["auto", *recognise.READERS], "format of the source; auto recognises it", flag_values=fv
    )
    flags.DEFINE_multi_string(
        "images", [],
        "folder that image names in the source are relative to; default: the source's own. Give it several times to "
        "look each name up in one folder after the other", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_bool("follow_links", False, "follow links that lead out of the folders of images", flag_values=fv)
    flags.DEFINE_string(
        "pictures", "", "folder of tars with the pictures that the source's tars of the same names lack", flag_values=fv
    )
    flags.DEFINE_string(
        "synthetic_keys", "^syn_text.*$", "regular expression of the keys in syn.json whose captions are taken",
        flag_values=fv,
    )  # fmt: skip
    for name, what in (("augmentations", "augmentations"), ("captions", "synthetic captions")):
        flags.DEFINE_integer(
            f"keep_{name}", 0, f"{what} that each record keeps, the first ones; 0 = all", lower_bound=0, flag_values=fv
        )
    flags.DEFINE_string(
        "boxes", "", "picture whose pixels the boxes of augmentations count: original, as the .json beside the picture "
        "tells its size, or N, the picture shrunk to a longer side of N; default: the picture", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "questions", None, "text file with a question a line; one is asked about each caption", flag_values=fv
    )
    flags.DEFINE_string("split", "train", "split that the records are written to", flag_values=fv)
    flags.DEFINE_string(
        "source_split", None, "split to read of a source that has several; default: --split", flag_values=fv
    )
    flags.DEFINE_float(
        "validation_share",
        0.0,
        "fraction of the pictures that goes to validation, with all their records",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_side", 0, "longest side of an image, pixels; larger images are shrunk to it; 0 = no limit", flag_values=fv
    )
    flags.DEFINE_integer("quality", 92, "JPEG quality of images that are shrunk", flag_values=fv)
    flags.DEFINE_integer("shard_mb", 256, "size at which a shard ends, MB", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer(
        "workers", 0, "worker processes, or jobs at once with Ray; 0 = one a core", lower_bound=0, flag_values=fv
    )
    flags.DEFINE_enum(
        "runner", "processes", ["processes", "ray"],
        "who does the work: processes of this machine, or tasks of a Ray cluster whose nodes all see the source and "
        "the output under the same paths", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "address", None, "HOST:PORT of the Ray cluster; default: RAY_ADDRESS, or a cluster on this machine",
        flag_values=fv,
    )  # fmt: skip
    define_tokenizer(fv)
    flags.DEFINE_string(
        "exclude", "", "list of records to leave out, as `data inspect --against` writes it", flag_values=fv
    )
    flags.DEFINE_bool("verify", False, "decode every image in full", flag_values=fv)
    flags.DEFINE_bool("overwrite", False, "replace a split of another source or other settings", flag_values=fv)
    parse(fv, argv, required=("source", "output"))
    from fastvlm_jax.data import write
    from fastvlm_jax.data.write import progress_bar

    settings = write.Settings(
        split=fv.split, validation_share=fv.validation_share, max_side=fv.max_side, quality=fv.quality,
        verify=fv.verify, shard_bytes=fv.shard_mb << 20, tokenizer=fv.tokenizer, template=fv.template,
        turns=fv.turns, exclude=fv.exclude,
    )  # fmt: skip
    questions = write.read_questions(fv.questions) if fv.questions else ()
    options = Options(
        tuple(fv.images), questions, fv.source_split or fv.split, fv.follow_links, fv.pictures, fv.synthetic_keys,
        fv.keep_augmentations, fv.keep_captions, fv.boxes,
    )  # fmt: skip
    with progress_bar.shown() as show:
        summary = write.write(
            fv.source, fv.output, format=fv.format, options=options, settings=settings, workers=fv.workers,
            runner=fv.runner, address=fv.address, overwrite=fv.overwrite, progress=show,
        )  # fmt: skip
    print(summary.describe(fv.output))


def inspect_data(argv: list[str]) -> None:
    """Prints the contents of a data set and, with a config, how its run would use them."""
    fv = flags.FlagValues()
    flags.DEFINE_string("data", None, "folder of shards; with --config it replaces the config's data", flag_values=fv)
    define_config(fv, argv, "config of a run, FILE.py or FILE.py:ARG: its batches are measured too")
    flags.DEFINE_string("split", "train", "split to look at", flag_values=fv)
    flags.DEFINE_bool(
        "verify", False, "compare the checksums of all shards, and of what lies beside them", flag_values=fv
    )
    flags.DEFINE_string(
        "output", "", "HTML file with samples as the model sees them; with --against the list of matches, JSON lines",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer("samples", 16, "number of samples in the HTML file", lower_bound=0, flag_values=fv)
    flags.DEFINE_string(
        "keys", "", "records that the HTML file shows, KEY[,KEY] or @FILE: JSON lines with a key each, such as the "
        "bad_steps.jsonl of a run; without --samples it shows all", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string("json", "", "JSON file for all numbers", flag_values=fv)
    flags.DEFINE_string(
        "list_unusable",
        "",
        "file that lists the records that the run cannot use; default: beside the HTML file",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "against", None, "folder of a benchmark's files, of shards or of images, which are looked for in --data",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string("benchmark", None, "with --against: benchmark whose published files these are", flag_values=fv)
    flags.DEFINE_list(
        "kinds", None, "with --against: kinds of matches to look for; default: file,pixels,near,question",
        flag_values=fv,
    )  # fmt: skip
    parse(fv, argv)
    if fv.against:
        return inspect_against(fv)
    if fv.benchmark or fv.kinds:
        name = "benchmark" if fv.benchmark else "kinds"
        raise flags.Error(f"--{name} goes with --against, the folder of a benchmark's files: give both")
    if not fv.config and not fv.data:
        raise ValueError("--data is missing: name a folder of shards, or the --config of a run")
    if fv.keys and not (fv.config and fv.output):
        raise flags.Error("--keys shows records as a run sees them: give its --config, and --output FILE.html")
    from fastvlm_jax.data.inspect import Outputs, inspect, inspect_run
    from fastvlm_jax.data.inspect.listed import read_keys

    keys = read_keys(fv.keys) if fv.keys else ()
    samples = len(keys) if keys and not fv["samples"].present else fv.samples
    outputs = Outputs(fv.output, fv.json, fv.list_unusable, samples, keys)
    if fv.config:
        from fastvlm_jax.data.load.from_config import make_builder
        from fastvlm_jax.stage import open_processor

        if "text" in fv.config.model:
            raise ValueError(
                "--config is of stage 0, whose pairs this page does not show: give --data FOLDER without --config"
            )
        if fv.data:
            fv.config.data.path = fv.data
        seed = fv.config.seed if fv.split == "train" else None  # another split is read in its records' order
        build = make_builder(fv.config.data, open_processor(fv.config), fv.split, seed)
        print(inspect_run(build, fv.config.data.images_per_group, fv.verify, outputs))
    else:
        print(inspect(fv.data, fv.split, fv.verify, outputs))


def inspect_against(fv: flags.FlagValues) -> None:
    """Prints which images and questions of a benchmark a data set holds, and writes their list."""
    for name in ("config", "verify", "list_unusable", "keys"):
        if fv[name].value:
            raise flags.Error(f"--{name} is not for --against, which looks at the shards that --data names")
    if not fv.data:
        raise ValueError("--data is missing: name the folder of shards to compare with --against")
    from fastvlm_jax.data.sources import read_shards
    from fastvlm_jax.evaluate import contamination, looked_for

    kinds = fv.kinds or looked_for.KINDS
    if unknown := [kind for kind in kinds if kind not in looked_for.KINDS]:
        raise flags.Error(f"--kinds {unknown[0]}: the kinds are {', '.join(looked_for.KINDS)}")
    source = read_shards(fv.data, fv.split)
    name, rows = looked_for.open_rows(fv.against, fv.benchmark, fv.data, fv.split)
    known = looked_for.learn(name, rows, kinds)
    with tqdm_bar("compare", len(source), "record") as bar:
        report = contamination.compare(source, known, kinds, fv.output, bar.update)
    if fv.json:
        to_json(dataclasses.asdict(report), fv.json)
    print(contamination.describe(report, known, fv.data))
    if fv.output:
        print(f"list: {fv.output}; to leave these records out, write the data set again:")
        print(f"  fastvlm data write --source {fv.data} --exclude {fv.output} --output DIR")


def tqdm_bar(what: str, total: int | None, unit: str):
    """Returns a progress bar over so many units, on a terminal."""
    import tqdm

    return tqdm.tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty())


def easy_vqa_data(argv: list[str]) -> None:
    """Writes easy-VQA as shards."""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "folder for the shards", flag_values=fv)
    parse(fv, argv, required=("output",))
    from fastvlm_jax.data.sets.easy_vqa import write_easy_vqa

    print(f"{fv.output}: {write_easy_vqa(fv.output)}")


def documents_data(argv: list[str]) -> None:
    """Draws pages of numbers and texts, and writes them as shards."""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "folder for the shards", flag_values=fv)
    flags.DEFINE_integer(
        "pages", 8000, "training pages; validation gets a 16th as many, test an 8th", lower_bound=1, flag_values=fv
    )
    flags.DEFINE_integer("seed", 0, "seed of the pages", lower_bound=0, flag_values=fv)
    flags.DEFINE_list(
        "parts", ["pages", "numbers", "large_numbers"],
        "what to write: the pages, and the two sets for tiny models; the others can be added later", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer("workers", 0, "processes; 0 = one a core", lower_bound=0, flag_values=fv)
    parse(fv, argv, required=("output",))
    from fastvlm_jax.data.sets.documents.write import PARTS, write_documents

    with tqdm_bar("draw", None, "page") as bar:

        def show(drawn: int, count: int) -> None:
            bar.total = count
            bar.update(drawn)

        counts = write_documents(fv.output, fv.pages, fv.seed, parts=fv.parts, workers=fv.workers, progress=show)
    for name in fv.parts:
        print(f"{pathlib.Path(fv.output, PARTS[name].folder)}: {counts}")


def icons_data(argv: list[str]) -> None:
    """Draws icons of things in several styles, and writes them with their names as shards."""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "folder for the shards", flag_values=fv)
    flags.DEFINE_integer("size", 128, "side of the pictures, pixels", flag_values=fv)
    flags.DEFINE_string(
        "packages", None, "folder that holds the packages, as `npm pack` writes them or unpacked as in node_modules; "
        "default: npm fetches them", flag_values=fv,
    )  # fmt: skip
    parse(fv, argv, required=("output",))
    from fastvlm_jax.data.sets.icons.write import write_icons

    with tqdm_bar("read", None, "icon") as bar:

        def show(what: str, done: int, count: int) -> None:
            if done == 0:
                bar.reset(count)
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        counts = write_icons(fv.output, fv.size, fv.packages, progress=show)
    print(f"{fv.output}: {counts}")


def train_tokenizer(argv: list[str]) -> None:
    """Trains a tokenizer on the texts of a data set, for a small model that is trained from scratch."""
    fv = flags.FlagValues()
    flags.DEFINE_string("data", None, "folder of shards; the tokenizer is written beside them", flag_values=fv)
    flags.DEFINE_string("split", "train", "split whose texts it is trained on", flag_values=fv)
    flags.DEFINE_integer("vocab_size", 512, "largest number of ids", lower_bound=1, flag_values=fv)
    parse(fv, argv, required=("data",))
    from fastvlm_jax.data.write.tokenizer import write_tokenizer

    print(f"wrote {write_tokenizer(fv.data, fv.vocab_size, fv.split)}")


def reinforce_data(argv: list[str]) -> None:
    """Writes pairs with augmentations and the embeddings of teachers, and prints the commands that come next."""
    xla_flags.apply()
    fv = flags.FlagValues()
    flags.DEFINE_string("source", None, "folder of shards with pairs of a picture and its caption", flag_values=fv)
    flags.DEFINE_list(
        "teacher", None, "models with an image and a text tower, separated by commas: directories of open_clip or "
        "ml-mobileclip with CLIP's vocabulary in them, or workdirs of stage 0", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "folder for the tars", flag_values=fv)
    flags.DEFINE_string("split", "train", "split of the source", flag_values=fv)
    flags.DEFINE_integer("augmentations", 10, "augmented views of each picture", flag_values=fv)
    flags.DEFINE_integer("image_size", 224, "side of the augmented views, pixels", flag_values=fv)
    flags.DEFINE_list(
        "crop_area", "0.08,1", "smallest and largest fraction of a picture's area in a view, as data.crop_area",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_list(
        "operations", "2,9", "number of RandAugment's operations on a view and their magnitude, as data.operations",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "seed of the augmentations", flag_values=fv)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the stored embeddings", flag_values=fv)
    flags.DEFINE_integer("batch_size", 64, "views, and texts, that a teacher sees at once", flag_values=fv)
    flags.DEFINE_integer("tar_records", 1024, "records of the source in a tar", flag_values=fv)
    flags.DEFINE_integer("workers", 0, "threads that decode and augment; 0 = one a core", flag_values=fv)
    flags.DEFINE_bool("overwrite", False, "replace pairs of another source, teachers or settings", flag_values=fv)
    parse(fv, argv, required=("source", "teacher", "output"))
    from fastvlm_jax import distributed
    from fastvlm_jax.reinforce import Settings, progress_bar, reinforce

    if job := distributed.find_settings():
        raise ValueError(
            f"this is process {job.process_id} of {job.num_processes}, and data reinforce runs as one: give each host "
            "a --source and an --output of its own, and set FASTVLM_NUM_PROCESSES=1"
        )
    values = {field.name: fv[field.name].value for field in dataclasses.fields(Settings)}
    values["crop_area"] = numbers(fv, "crop_area", float, "two numbers, as 0.08,1")
    values["operations"] = numbers(fv, "operations", int, "two whole numbers, as 2,9")
    settings = Settings(**values)
    with progress_bar.shown() as show:
        summary = reinforce(fv.source, fv.teacher, fv.output, settings, overwrite=fv.overwrite, progress=show)
    print(summary.describe())


def define_tokenizer(fv: flags.FlagValues) -> None:
    """Defines the flags that choose how texts become tokens."""
    flags.DEFINE_string(
        "tokenizer",
        "",
        "tokenizer file, GGUF file or folder; with it tokens are counted for the index",
        flag_values=fv,
    )
    flags.DEFINE_string("template", "qwen_2", "conversation template, as data.template in configs", flag_values=fv)
    flags.DEFINE_string("turns", "conversation", "conversation or separate, as data.turns", flag_values=fv)
