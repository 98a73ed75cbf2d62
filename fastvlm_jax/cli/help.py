"""Explains the commands: the text of --help, what a group of commands prints, and what was meant by a mistyped name."""

import difflib
import re
import sys
import textwrap
from collections.abc import Iterable

from absl import flags

# Command -> the sentence and the example that open its --help.
ABOUT = {
    "train": (
        "Trains the stage that a config describes; the same command goes on with a run that was stopped.",
        "fastvlm train --config configs/stage2_instruct.py:0.5b --workdir runs/mine --config.data.path=data/mine "
        "--config.parent=MODEL",
    ),
    "finetune": (
        "Tunes a model on your own pictures and answers, from the data to a page; the same command goes on.",
        "fastvlm finetune --model MODEL --data mine.json --images images --output runs/mine --lora",
    ),
    "init": (
        "Chooses the settings of a fine-tuning run for a data set and this machine, as a config file with comments.",
        "fastvlm init --model MODEL --data data/mine --output runs/mine --lora",
    ),
    "generate": (
        "Lets a model answer questions about images, one after the other.",
        'fastvlm generate --model runs/mine --image cat.jpg --prompt "What is it doing?"',
    ),
    "chat": (
        "Opens a page of this machine to talk with a model about images; with --terminal talks in the shell.",
        "fastvlm chat --model runs/mine",
    ),
    "evaluate": (
        "Scores a model on benchmarks or on your own data; the same command goes on with what was stopped.",
        "fastvlm evaluate --model runs/mine --benchmark qa --data data/mine",
    ),
    "convert": (
        "Writes a model in another layout, for PyTorch or for this program; the layout of the source is recognised.",
        "fastvlm convert --source runs/mine --target fastvlm-mine --layout hf",
    ),
    "data write": (
        "Writes images and texts of any known format as shards, the form that training reads.",
        "fastvlm data write --source mine.json --images images --output data/mine --validation_share 0.1",
    ),
    "data inspect": (
        "Shows what a data set holds and, with the config of a run, how the run would use it.",
        "fastvlm data inspect --data data/mine",
    ),
    "data easy-vqa": (
        "Writes easy-VQA, the data set of the quickstart, as shards.",
        "fastvlm data easy-vqa --output data/easy_vqa",
    ),
    "data documents": (
        "Draws pages of real numbers and texts with transcriptions and questions, and writes them as shards.",
        "fastvlm data documents --output data/documents",
    ),
    "data reinforce": (
        "Adds augmentations and the embeddings of teachers to pairs, as tars in DataCompDR's layout; the same command "
        "goes on with what was stopped.",
        "fastvlm data reinforce --source data/pairs --teacher MODEL --output data/reinforced",
    ),
    "data icons": (
        "Draws icons of npm packages in several styles, and writes them with their names as pairs for stage 0.",
        "fastvlm data icons --output data/icons",
    ),
    "data tokenizer": (
        "Trains a tokenizer on the texts of a data set, for a small model that is trained from scratch.",
        "fastvlm data tokenizer --data data/mine",
    ),
    "preflight": (
        "Compiles the program of a config for a TPU slice, without a TPU, and estimates its memory and time; of GPUs, "
        "estimates the memory by arithmetic.",
        "fastvlm preflight --config configs/stage2_instruct.py:0.5b --topology v5e:4x4",
    ),
    "bench input": (
        "Times the training input of a config on this machine, beside other ways to read the same images.",
        "fastvlm bench input --config configs/stage2_instruct.py:0.5b --config.data.path=data/mine "
        "--config.data.tokenizer=MODEL",
    ),
    "bench ttft": (
        "Times the first token of an answer about an image, part by part, or estimates it for a TPU.",
        "fastvlm bench ttft --model runs/mine --image_size 256,512,1024,1024:2x2 --output ttft.json",
    ),
    "sweep": (
        "Trains, scores and times a grid of models; the same command goes on with what was stopped.",
        "fastvlm sweep --config configs/resolution_scaling.py --workdir runs/sweep",
    ),
    "bench step": (
        "Times a training step of a config by parts on this machine, with random weights, pixels and tokens.",
        "fastvlm bench step --config configs/stage2_instruct.py:0.5b --config.data.groups=2 --output step.json",
    ),
    "bench kernels": (
        "Times the forms of the encoder's functions on this machine, or compares TPU kernels with XLA by the compiler.",
        "fastvlm bench kernels --topology v5e:1x1",
    ),
    "checkpoint verify": (
        "Reads the checkpoints of a run, or one of them, and compares every array with the digest stored with it.",
        "fastvlm checkpoint verify runs/mine",
    ),
    "checkpoint list": (
        "Lists the checkpoints of a run with their data positions, sizes and times.",
        "fastvlm checkpoint list runs/mine",
    ),
    "report": (
        "Writes a page about training runs, or the figures and the page of a sweep, whose folder is named alone.",
        "fastvlm report runs/first runs/second --output report.html",
    ),
}
_WIDTH = 108  # characters of a line of help
_COLUMN = 30  # where the meanings begin
_ASKED = {"--help", "-h", "-help", "--helpfull", "--helpshort"}


def asks_help(argv: list[str]) -> bool:
    """Returns whether a command line asks for help."""
    return not _ASKED.isdisjoint(argv)


def choose(program: str, argv: list[str], commands: Iterable[str], text: str) -> str:
    """Returns the command that argv[0] names.

    If it asks for help in place of a command, `text` is printed and the process ends with status 0; if there is no
    command at all, `text` goes to stderr and the status is 2, as for any wrong usage.

    Args:
      program: what stands before the command, as "fastvlm data".
      argv: the rest of the command line.
      commands: names of the commands.
      text: the help.

    Raises:
      flags.Error: there is no such command; the message names the most similar one.
    """
    if argv and argv[0] in commands:
        return argv[0]
    if argv[:1] == ["help"] or asks_help(argv):
        print(text)
        raise SystemExit(0)
    if not argv:
        print(text, file=sys.stderr)
        raise SystemExit(2)
    raise flags.Error(f"unknown command {argv[0]!r}{meant(argv[0], commands)}; `{program}` has {', '.join(commands)}")


def group(name: str) -> str:
    """Returns the help of a group of commands: each with its sentence and its example."""
    own = {command.split()[1]: about for command, about in ABOUT.items() if command.startswith(f"{name} ")}
    lines = [f"`fastvlm {name}` has {', '.join(own)}; `fastvlm {name} COMMAND --help` explains the flags of one."]
    for command, (sentence, example) in own.items():
        lines += ["", f"{command}: {sentence}", f"  {example}"]
    return "\n".join(lines)


def command(name: str, fv: flags.FlagValues, required: Iterable[str], positional: str) -> str:
    """Returns the help of a command: its sentence, its example and its flags, the required ones first.

    Args:
      name: command in ABOUT.
      fv: its flags, in the order in which they are listed.
      required: names of the flags that must be given.
      positional: name of its positional arguments, "" if it takes none.
    """
    sentence, example = ABOUT[name]
    lines = [sentence, "", f"  {example}", "", "flags (* must be given):"]
    if positional:
        lines.append(_entry("*", positional, "one or more"))
    ordered = sorted((flag for flag in fv if "." not in flag), key=lambda flag: flag not in required)
    for flag in ordered:
        lines.append(_entry("*" if flag in required else " ", _written(fv[flag]), _meaning(fv[flag])))
        if flag == "config":
            lines.append(_entry(" ", "--config.KEY=VALUE", "another value for a key of the config; see docs/config.md"))
    return "\n".join(lines)


def _written(flag: flags.Flag) -> str:
    """Returns a flag as one writes it: "--limit=N"."""
    value = {"bool": "", "int": "=N", "float": "=X"}.get(flag.flag_type(), "=...")
    return f"--{flag.name}{value}"


def _meaning(flag: flags.Flag) -> str:
    """Returns what a flag does, its choices and its default."""
    # absl adds its own words to the help of an enum and of a flag that may be repeated.
    text = re.sub(r"^<.*?>: |;\s+repeat this option to specify a list of values$", "", flag.help)
    if choices := getattr(flag.parser, "enum_values", None):
        text += f"; one of {', '.join(choices)}"
    if flag.default is not False and flag.default not in (None, "", []) and "default" not in text:
        text += f" (default {flag.default})"
    return text


def _entry(mark: str, written: str, meaning: str) -> str:
    lines = textwrap.wrap(meaning, _WIDTH - _COLUMN)
    return f"{mark} {written:<{_COLUMN - 2}}" + f"\n{' ' * _COLUMN}".join(lines)


def meant(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the known name that is most similar to a mistyped one, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
