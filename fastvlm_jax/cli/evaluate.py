"""Runs `fastvlm evaluate`: scores a model on benchmarks, or on one's own data."""

import os
import pathlib
import re
import sys

from absl import flags

from fastvlm_jax import xla_flags
from fastvlm_jax.cli.arguments import define_processes, numbers, parse, processes, to_json

OWN = ("split", "turns", "metric")  # flags of the benchmark qa
TOWERS = ("zero-shot", "retrieval")  # benchmarks of a model of stage 0, which have --split too
METRICS = ("exact", "anls", "vqa", "relaxed", "f1", "choice")  # those of evaluate/benchmarks/qa.py
# What else the command does, which asks no model -> the flags that may stand beside it.
WITHOUT_MODEL = {
    "list": ("benchmark",), "compare": ("output",), "review": ("benchmark", "data", "protocol", "output"),
}  # fmt: skip


def evaluate(argv: list[str]) -> None:
    """Lets a model answer the questions of benchmarks, prints the table of its scores, and writes all answers."""
    xla_flags.apply()
    fv = flags.FlagValues()
    define(fv)
    mode = next((name for name in WITHOUT_MODEL if any(re.match(f"--?{name}(=|$)", word) for word in argv)), "")
    required = {"": ("model", "data"), "review": ("data",)}.get(mode, ())
    paths = parse(fv, argv, required=required, positional="file of predictions" if mode == "compare" else "")
    for name in fv:
        if fv[name].present and fv[name].value in ("", []):
            raise flags.Error(f"--{name} is empty")
    names = [name.strip() for name in fv.benchmark.split(",") if name.strip()]
    if not names or ("all" in names and len(names) > 1):
        raise flags.Error(
            f"--benchmark={fv.benchmark}: give names of benchmarks with commas between them, or all alone"
        )
    if mode:
        for name in fv:
            if fv[name].present and name not in (mode, *WITHOUT_MODEL[mode]):
                raise flags.Error(f"--{name} has no meaning with --{mode}")
        print(answer_without_model(fv, mode, names, paths))
        return
    own = {name: fv[name].value for name in OWN if fv[name].value is not None}
    allowed = {"qa"} if own.keys() - {"split"} else {"qa", *TOWERS}
    if own and not {*names} <= allowed:
        name = next(iter(own.keys() - {"split"}), "split")
        benchmarks = " or ".join(sorted(allowed))
        raise flags.Error(f"--{name} is for --benchmark={benchmarks}: {fv.benchmark} has settings of its own")
    if fv.max_tokens and {*names} & {*TOWERS}:
        raise flags.Error(f"--max_tokens has no meaning for {fv.benchmark}, which asks for no answer")
    folder = output_folder(fv.output, fv.model)
    from fastvlm_jax import distributed

    with distributed.started(processes(fv)), distributed.StopRequest() as stop:
        run(fv, names, own, folder, stop.reached)


def define(fv: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "model to score", flag_values=fv)
    flags.DEFINE_string(
        "benchmark", "easy-vqa",
        "benchmarks to score it on, separated by commas; all takes those whose files are there; qa is your own data",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "data", None,
        "folder with the published files, or with a folder of them for each benchmark; qa: folder of shards, or a list "
        "of questions, .jsonl or .json",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "protocol", None, "how it is asked and scored: paper, llava or lmms-eval; default: each benchmark's first",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer(
        "limit", None, "number of questions to ask of each; default: all", lower_bound=1, flag_values=fv
    )
    flags.DEFINE_string(
        "samples", "", "ids of the questions to ask, separated by commas, or @FILE with one a line", flag_values=fv
    )
    flags.DEFINE_integer(
        "max_tokens", None, "longest answer, tokens; default: the protocol's", lower_bound=1, flag_values=fv
    )
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"],
        "dtype of parameters and computation; default: bfloat16 on a GPU or TPU; on a CPU float32 parameters and the "
        "model's computation", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_integer(
        "batch_size", None, "most questions that a data shard of the mesh answers at once; default: as many as fit",
        lower_bound=1, flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_list(
        "mesh", None, "sizes of replica,data,fsdp,tensor; -1 takes the devices that are left; default: 1,-1,1,1",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "output", None, "folder for all files; default: evaluation/ and the model's name", flag_values=fv
    )
    flags.DEFINE_integer(
        "page_rows", 300, "most questions of each benchmark on the page predictions.html; of more, some are drawn",
        lower_bound=1, flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_bool(
        "list", False, "tell which benchmarks there are, their files and the paper's figures; with --benchmark all of "
        "one", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_bool(
        "compare", False, "compare two files of predictions, question by question: --compare A.jsonl B.jsonl",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "review",
        None,
        "llava-w, mm-vet: file of a judge's replies to score, with --benchmark and --data",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "split", None, "qa, zero-shot, retrieval: split to score; default: validation of shards, test of other files",
        flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_enum(
        "turns", None, ["conversation", "separate"],
        "qa: ask with the earlier turns of a record, or each question alone; default: conversation", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_enum(
        "metric", None, METRICS, "qa: how answers are scored; default: exact, or choice for questions with choices",
        flag_values=fv,
    )  # fmt: skip
    define_processes(fv)


def answer_without_model(fv: flags.FlagValues, mode: str, names: list[str], paths: list[str]) -> str:
    """Returns what --list, --compare or --review prints; the last two write it to files in --output too."""
    from fastvlm_jax.evaluate import compare, listing, suite
    from fastvlm_jax.evaluate.benchmarks import BENCHMARKS, known

    folder = None if fv.output is None else output_folder(fv.output, "")
    if mode == "list":
        chosen = known(names) if fv["benchmark"].present and names != ["all"] else []
        return "\n\n".join(map(listing.details, chosen)) if chosen else listing.listing(BENCHMARKS.values())
    if mode == "compare":
        if len(paths) != 2:
            raise flags.Error(f"--compare takes two files of predictions, A.jsonl B.jsonl, and not {len(paths)}")
        comparison = compare.compare(*(pathlib.Path(path).expanduser() for path in paths))
        to_json(comparison, folder and str(folder / "comparison.json"))
        return compare.describe(comparison)
    name, summary = suite.review(names, fv.data, BENCHMARKS, fv.review, protocol=fv.protocol)
    return to_json(summary, folder and str(folder / f"{name}.review.json"))


def run(fv: flags.FlagValues, names: list[str], own: dict, folder: pathlib.Path, stopped) -> None:
    """Scores the model, and prints the table and the files in process 0."""
    import jax

    from fastvlm_jax import files, model_io
    from fastvlm_jax.evaluate import paper, score_table, suite
    from fastvlm_jax.evaluate.benchmarks import BENCHMARKS, clip_benchmark, qa
    from fastvlm_jax.report import predictions

    def tell(line: str) -> None:
        if jax.process_index() == 0:
            print(f"evaluate: {line}", file=sys.stderr, flush=True)

    limit = None if fv.samples else fv.limit
    known = {**BENCHMARKS, "zero-shot": clip_benchmark.zero_shot(fv.split, limit)}
    known |= {"retrieval": clip_benchmark.retrieval(fv.split, limit), "qa": qa.benchmark(**own, limit=limit)}
    entries = suite.choose(
        names, fv.data, known, protocol=fv.protocol, limit=fv.limit, samples=read_ids(fv.samples), told=tell
    )
    mesh = make_mesh(fv)
    loaded = model_io.read(fv.model)
    model, variables = model_io.put(loaded, fv.dtype, mesh)
    if fv.output is None:
        tell(f"the results go to {folder}")
    done = suite.evaluate(
        entries, model, variables, loaded.processor, folder,
        source={"path": fv.model, "dtype": model.dtype, **loaded.lineage}, max_tokens=fv.max_tokens,
        mesh=mesh, batch_size=fv.batch_size, stopped=stopped, told=tell,
    )  # fmt: skip
    if jax.process_index() == 0:
        config, seen = loaded.config, loaded.processor
        rows = paper.rows_of(config.get("vision"), config.get("llm"), seen.image_size, getattr(seen, "grids", ()))
        in_domain = [entry.benchmark.name for entry in entries if entry.benchmark.in_domain]
        table = score_table.make_table([summary for summary, _ in done], rows, in_domain)
        files.write_whole(folder / "table.md", f"{table.markdown()}\n".encode())
        print(f"{table.text()}\n")
        for entry in entries:
            print(folder / f"{entry.name}.json")
        print(predictions.write_page(folder, done, rows=fv.page_rows))


def make_mesh(fv: flags.FlagValues):
    """Returns the mesh of --mesh; by default all devices answer different questions. None for a single device."""
    import jax

    from fastvlm_jax import sharding

    if fv.mesh is None:
        return None if jax.device_count() == 1 else sharding.make_mesh((1, -1, 1, 1))
    return sharding.make_mesh(numbers(fv, "mesh", int, "four whole numbers: replica,data,fsdp,tensor"))


def output_folder(output: str | None, model: str) -> pathlib.Path:
    """Returns the folder for the files; raises flags.Error if --output names a file."""
    if output is None:
        path = pathlib.Path(re.sub(r"\w+=", "", model).split(",")[0]).expanduser().resolve()
        parts = [path.name] if not path.name.isdigit() else [path.parent.parent.name, path.name]
        return pathlib.Path("evaluation", "-".join(parts))
    folder = pathlib.Path(output).expanduser()
    if folder.suffix in (".json", ".jsonl", ".html"):
        raise flags.Error(
            f"--output={output} must be a folder, which gets several files: give {os.fspath(folder.with_suffix(''))}"
        )
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "is a folder in which you may not write"
        raise flags.Error(f"--output={output} must be a folder for several files, and {there} {what}: give another")
    return folder


def read_ids(samples: str) -> list[str]:
    """Returns the ids that --samples gives; raises flags.Error if it gives none, or its file cannot be read."""
    names = samples.split(",")
    if samples.startswith("@"):
        try:
            names = pathlib.Path(samples[1:]).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise flags.Error(f"--samples={samples}: the file of ids cannot be read: {why}") from error
    ids = [name.strip() for name in names if name.strip()]
    if samples and not ids:
        raise flags.Error(f"--samples={samples} names no question: leave it out to ask all")
    return ids
