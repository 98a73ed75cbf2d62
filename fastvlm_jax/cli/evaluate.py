"""Runs `fastvlm evaluate`: scores a model on a benchmark, or on one's own data."""

import sys

from absl import flags

from fastvlm_jax.cli.arguments import parse, to_json


def evaluate(argv: list[str]) -> None:
    """Lets a model answer the questions of a benchmark, and prints the summary of its scores as JSON."""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to score", flag_values=fv)
    flags.DEFINE_enum(
        "benchmark", "easy-vqa", ["easy-vqa", "qa"], "benchmark to score it on; qa is your own data", flag_values=fv
    )
    flags.DEFINE_string("data", None, "folder of the benchmark's data, as `fastvlm data` writes it", flag_values=fv)
    flags.DEFINE_integer("limit", None, "number of questions to ask; default: all", lower_bound=1, flag_values=fv)
    flags.DEFINE_string("split", None, "qa: split to score; default: validation", flag_values=fv)
    flags.DEFINE_integer("max_tokens", None, "qa: longest answer, tokens; default: 128", lower_bound=1, flag_values=fv)
    flags.DEFINE_enum(
        "turns", None, ["conversation", "separate"],
        "qa: ask with the earlier turns of a record, or each question alone; default: conversation", flag_values=fv,
    )  # fmt: skip
    flags.DEFINE_string(
        "output", None, "JSON file that the summary is also written to; of qa with each wrong answer", flag_values=fv
    )
    parse(fv, argv, required=("model", "data"))
    own = {name: fv[name].value for name in ("split", "max_tokens", "turns") if fv[name].value is not None}
    if fv.benchmark == "qa":
        summary, wrong = score_own_data(fv, own)
    elif own:
        raise flags.Error(f"--{next(iter(own))} is for --benchmark=qa: {fv.benchmark} has settings of its own")
    else:
        summary, wrong = score_easy_vqa(fv), {}
    to_json(summary | wrong, fv.output)
    print(to_json(summary, None))


def score_easy_vqa(fv: flags.FlagValues) -> dict:
    """Scores the model on easy-VQA, and returns the summary."""
    import fastvlm_jax
    from fastvlm_jax.evaluate.benchmarks import easy_vqa

    total = easy_vqa.count_questions(fv.data, fv.limit)
    model, variables, processor = fastvlm_jax.load(fv.model)
    with shown(total) as bar:
        summary, _ = easy_vqa.evaluate(model, variables, processor, fv.data, limit=fv.limit, progress=bar.update)
    return {"model": fv.model, **summary}


def score_own_data(fv: flags.FlagValues, own: dict) -> tuple[dict, dict]:
    """Scores the model on a folder of shards, and returns the summary and {"wrong": the wrong answers}."""
    import fastvlm_jax
    from fastvlm_jax.evaluate.benchmarks import qa

    settings = qa.Settings(limit=fv.limit, **own)
    model, variables, processor = fastvlm_jax.load(fv.model)
    asked = qa.read(processor, fv.data, settings)
    with shown(len(asked.questions)) as bar:
        summary, results = qa.evaluate(model, variables, processor, asked, settings, bar.update)
    return {"model": fv.model, "data": fv.data, **summary}, {"wrong": qa.wrong_answers(results)}


def shown(total: int):
    """Returns a progress bar over so many questions, on a terminal."""
    import tqdm

    return tqdm.tqdm(total=total, desc="evaluate", unit="question", disable=not sys.stderr.isatty())
