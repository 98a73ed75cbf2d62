"""Runs `fastvlm report`: writes a page about training runs."""

import pathlib

from absl import flags

from fastvlm_jax.cli.arguments import parse


def report(argv: list[str]) -> None:
    """Writes the page and its pictures, and prints their paths."""
    fv = flags.FlagValues()
    flags.DEFINE_string("output", None, "HTML file; its pictures are written beside it", flag_values=fv)
    flags.DEFINE_string("model", None, "model for a sheet of answered test questions", flag_values=fv)
    flags.DEFINE_string("data", None, "folder of the data set with the questions", flag_values=fv)
    workdirs = parse(fv, argv, required=("output",), positional="WORKDIR")
    from fastvlm_jax.report.runs import write_report

    for path in write_report([pathlib.Path(w) for w in workdirs], pathlib.Path(fv.output), fv.model, fv.data):
        print(path)
