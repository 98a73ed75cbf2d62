"""Runs `fastvlm report`: writes a page about training runs, or about a sweep."""

import pathlib

from absl import flags

from fastvlm_jax.cli.arguments import parse


def report(argv: list[str]) -> None:
    """Writes the page and its pictures, and prints what a sweep found and the paths."""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "HTML file; its pictures are written beside it", flag_values=fv)
    flags.DEFINE_string(
        "model", None, "model for a sheet of answered test questions, of the page of runs", flag_values=fv
    )
    flags.DEFINE_string("data", None, "folder of the data set with the questions", flag_values=fv)
    folders = [pathlib.Path(name) for name in parse(fv, argv, required=("output",), positional="WORKDIR or SWEEP_DIR")]
    output = pathlib.Path(fv.output)
    from fastvlm_jax.report.sweep_results import is_sweep

    sweep = next(filter(is_sweep, folders), None)
    if sweep is None:
        from fastvlm_jax.report.runs import write_report

        paths = write_report(folders, output, fv.model, fv.data)
    elif len(folders) > 1 or fv.model or fv.data:
        raise ValueError(f"{sweep} is the folder of a sweep: name it alone, without --model and --data")
    else:
        from fastvlm_jax.report.sweep_page import write_sweep_report

        paths, told = write_sweep_report(sweep, output)
        print(*told, sep="\n", end="\n" if told else "")
    print(*paths, sep="\n")
