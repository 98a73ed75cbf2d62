"""Runs `fastvlm evaluate`: scores a model on a benchmark."""

import sys

from absl import flags

from fastvlm_jax.cli.arguments import parse, to_json


def evaluate(argv: list[str]) -> None:
    """Lets a model answer the questions of a benchmark, and prints the summary of its scores as JSON."""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to score", flag_values=fv)
    flags.DEFINE_enum("benchmark", "easy-vqa", ["easy-vqa"], "benchmark to score it on", flag_values=fv)
    flags.DEFINE_string("data", None, "folder of the benchmark's data", flag_values=fv)
    flags.DEFINE_integer("limit", None, "number of questions to ask; default: all", lower_bound=1, flag_values=fv)
    flags.DEFINE_string("output", None, "JSON file that the summary is also written to", flag_values=fv)
    parse(fv, argv, required=("model", "data"))
    import tqdm

    import fastvlm_jax
    from fastvlm_jax.evaluate.benchmarks import easy_vqa

    total = easy_vqa.count_questions(fv.data, fv.limit)
    model, variables, processor = fastvlm_jax.load(fv.model)
    with tqdm.tqdm(total=total, desc="evaluate", unit="question", disable=not sys.stderr.isatty()) as bar:
        summary, _ = easy_vqa.evaluate(model, variables, processor, fv.data, limit=fv.limit, progress=bar.update)
    print(to_json({"model": fv.model, **summary}, fv.output))
