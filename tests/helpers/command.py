"""The command line, called in this process."""

import sys

from fastvlm_jax import cli


def fastvlm(monkeypatch, capsys, *argv):
    """(exit status, stdout, stderr) of `fastvlm ARGV`."""
    monkeypatch.setattr(sys, "argv", ["fastvlm", *map(str, argv)])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()
