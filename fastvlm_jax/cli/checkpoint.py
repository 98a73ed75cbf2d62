"""Runs `fastvlm checkpoint`: lists and verifies the checkpoints of a training workdir."""

import pathlib

from absl import flags

from fastvlm_jax.cli import help
from fastvlm_jax.cli.arguments import parse


def checkpoint(argv: list[str]) -> None:
    """Runs the command behind `fastvlm checkpoint`."""
    commands = {"verify": verify, "list": list_checkpoints}
    name = help.choose("fastvlm checkpoint", argv[1:], commands, help.group("checkpoint"))
    commands[name]([f"checkpoint {name}", *argv[2:]])


def verify(argv: list[str]) -> None:
    """Reads checkpoints whole, prints a line about each, and fails if one is damaged."""
    paths = parse(flags.FlagValues(), argv, positional="WORKDIR")
    from fastvlm_jax.checkpoint import Damaged, verify

    folders = [folder for path in paths for folder in _folders(path)[1]]
    damaged = []
    for folder in folders:
        try:
            found = verify(folder)
        except Damaged as error:
            if not folder.is_dir():
                continue  # the run that writes here has removed it meanwhile
            damaged.append(folder)
            print(f"{folder}  DAMAGED: {error.reason}", flush=True)
        else:
            held = "whole" if found.sealed else "readable, but it has no digests: an older version wrote it"
            print(f"{folder}  {held}: {found.arrays} arrays", flush=True)
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(folders)} checkpoints damaged, {damaged[-1]} last: `fastvlm train` sets damaged "
            "ones aside and goes on from the latest whole one; for other commands, name a whole one as --model"
        )


def list_checkpoints(argv: list[str]) -> None:
    """Prints a line about each checkpoint of a workdir, without reading arrays."""
    paths = parse(flags.FlagValues(), argv, positional="WORKDIR")
    for path in paths:
        _list(*_folders(path))


def _list(workdir: pathlib.Path, folders: list[pathlib.Path]) -> None:
    from fastvlm_jax.checkpoint import Damaged, kept_aside, summarize
    from fastvlm_jax.metrics.best import best_of

    best = best_of(workdir)
    print(workdir)
    print(f"{'step':>10} {'next batch':>10} {'passed over':>11} {'MB':>9}  {'written':16}  digests")
    for folder in folders:
        try:
            found = summarize(folder)
        except (Damaged, FileNotFoundError) as error:
            if folder.is_dir():  # else the run that writes here has removed it meanwhile
                print(f"{folder.name:>10} DAMAGED: {getattr(error, 'reason', error)}")
            continue
        kind = ("yes" if found.sealed else "none") + (", best" if folder.name == str(best) else "")
        numbers = f"{found.position:>10} {found.passed_over:>11} {found.size / 1e6:>9.1f}"
        print(f"{folder.name:>10} {numbers}  {found.written:%Y-%m-%d %H:%M}  {kind}")
    for folder in kept_aside(workdir):
        print(f"{folder.name}: set aside by a run")


def _folders(path: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Returns (workdir, checkpoint folders) of a workdir, or of one checkpoint in it."""
    from fastvlm_jax.checkpoint import FOLDER, find, steps_of

    given = pathlib.Path(path).expanduser()
    found = find(given)
    if found is None:
        raise ValueError(f"{path} is no training workdir and no checkpoint in one")
    workdir, folder = found
    if given.absolute() != workdir:
        return workdir, [folder]
    return workdir, [workdir / FOLDER / str(step) for step in steps_of(workdir)]
