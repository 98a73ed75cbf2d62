"""Holds what the commands share: the usage text, and functions that parse flags and write JSON."""

import json
import pathlib
import re

from absl import flags

from fastvlm_jax.cli import help

USAGE = """Trains FastVLM, a vision-language model that answers questions about images, and uses what was trained.

  fastvlm generate --model runs/quickstart/stage2_instruct --image picture.png --prompt "what color is the shape?"

usage: fastvlm COMMAND [--flag=value ...]      (fastvlm COMMAND --help explains its flags)

  train     --config FILE.py[:ARG] --workdir DIR [--profile FIRST:LAST] [--config.KEY=VALUE ...]
            [--allow_changes KEY[,KEY]]
            [--coordinator_address HOST:PORT --num_processes N --process_id I]
  finetune  --model DIR --data PATH [--images DIR]... --output DIR [--lora]
  init      --model DIR --data DIR --output DIR [--lora] [--device gpu:24GB]
  generate  --model DIR --prompt TEXT [--image FILE ...] [--max_tokens N] [--sampling greedy|model]
            [--temperature T] [--top_p P] [--top_k K] [--repetition_penalty R]
  chat      --model DIR [--port N] [--no_browser] | --terminal  [--max_tokens N] [--temperature T] ...
  evaluate  --model DIR --benchmark NAME[,NAME]|all --data DIR [--protocol paper|llava|lmms-eval] [--output DIR]
                  [--limit N] [--samples ID[,ID]|@FILE] [--max_tokens N] [--dtype D] [--batch_size N] [--mesh R,D,F,T]
                  [--page_rows N]
            --model DIR --benchmark qa --data DIR [--split validation] [--turns conversation|separate]
            --list [--benchmark NAME]
            --compare A.predictions.jsonl B.predictions.jsonl [--output DIR]
            --review FILE.jsonl --benchmark llava-w|mm-vet --data DIR [--protocol P] [--output DIR]
  convert   --source DIR --target DIR --layout native|hf|llava|timm|openclip|gguf|peft [--dtype D]
            [--gguf_type T] [--fold] [--overwrite]
  data      write --source PATH --output DIR [--images DIR]... [--pictures DIR] [--validation_share S]
                  [--max_side N] [--exclude LIST] [--verify] [--runner ray [--address HOST:PORT]]
            inspect --data DIR | --config FILE.py[:ARG] [--output FILE.html] [--samples N] [--keys KEY[,KEY]|@FILE]
                    [--json FILE] [--verify]
                    --data DIR --against DIR [--benchmark NAME] [--kinds KIND,...] [--output LIST]
            easy-vqa --output DIR
            documents --output DIR [--pages N] [--parts PART,...] [--seed S] [--workers N]
            icons --output DIR [--size N] [--packages DIR]
            tokenizer --data DIR [--vocab_size N]
            reinforce --source DIR --teacher MODEL[,MODEL] --output DIR [--augmentations N] [--dtype bfloat16]
  preflight --config FILE.py[:ARG] --topology v5e:4x4 [--mode train|encoder|generate] [--search] [--output FILE.json]
            --config FILE.py[:ARG] --topology gpu:80GB|gpu:8x80GB [--output FILE.json]
  bench     input --config FILE.py[:ARG] --config.data.path=DIR [--seconds N] [--output FILE.json]
            step --config FILE.py[:ARG] [--against transformers] [--runs N] [--warmup N] [--output FILE.json]
            ttft --model DIR | --config FILE.py[:ARG] [--image_size N[,N:RxC]] [--prompt_tokens N] [--batch N]
                 [--dtype D] [--against transformers | --topology v5e:1x1] [--output FILE.json]
  sweep     --config FILE.py[:SETUP] --workdir DIR [--config.KEY=VALUE ...]
                  [--launcher tpu|gke|slurm|local --settings FILE [--ttft_settings FILE] [--remote gs://BUCKET/DIR]]
            --config FILE.py[:SETUP] --dry_run [--topology v5e:4x4 [--estimate arithmetic|compiler]]
  checkpoint verify | list WORKDIR [WORKDIR ...]
  report    WORKDIR [WORKDIR ...] --output FILE.html [--model DIR --data DIR]
            SWEEP_DIR --output FILE.html

--model, --source and --config.parent take a training workdir (its latest checkpoint; DIR@best is the best), one
checkpoint in it, a model directory of any layout, a GGUF file, or parts of a model from several places:
vision=DIR,llm=DIR[,projector=DIR]."""


def define_answers(fv: flags.FlagValues, temperature: str, seed: str, whole: str) -> None:
    """Defines the flags that say how a model answers, but for `max_tokens`.

    Args:
      temperature, seed: ends of their meanings.
      whole: what `max_length` counts the tokens of.
    """
    flags.DEFINE_float("temperature", 0.0, f"sampling temperature{temperature}; 0 = greedy decoding", flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "probability mass of the likeliest tokens to sample from", flag_values=fv)
    flags.DEFINE_integer("top_k", 0, "number of likeliest tokens to sample from; 0 = all", flag_values=fv)
    flags.DEFINE_float(
        "repetition_penalty",
        1.0,
        "what the logits of tokens in prompt and answer are divided by (multiplied if negative); 1 = nothing changes",
        flag_values=fv,
    )
    flags.DEFINE_integer("seed", 0, f"seed of the sampling{seed}", flag_values=fv)
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "dtype of parameters and computation; default: bfloat16 on a GPU or TPU; on a CPU float32 parameters and the "
        "model's computation",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_length", None, f"most tokens of {whole}; default: the model's context length", flag_values=fv
    )


def parse(fv: flags.FlagValues, argv: list[str], required: tuple[str, ...] = (), positional: str = "") -> list[str]:
    """Parses the flags of a command into `fv` and returns its positional arguments; --help explains them and exits.

    Args:
      argv: the command as help.ABOUT names it, then its arguments.
      required: flags that must be given.
      positional: name of the positional arguments; "" refuses any.

    Raises:
      flags.Error: an unknown, missing or malformed argument; the message names it.
      ValueError: the config does not have a key that is set, or cannot be read.
    """
    if help.asks_help(argv):
        print(help.command(argv[0], fv, required, positional))
        raise SystemExit(0)
    try:
        rest = fv(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        near = help.meant(f"--{error.flagname}", [f"--{name}" for name in fv])
        raise flags.Error(
            f"unknown flag --{error.flagname}{near}; `fastvlm {argv[0]} --help` lists the flags"
        ) from error
    except flags.IllegalFlagValueError as error:
        if "Non-boolean argument" not in str(error):
            raise
        name, _, value = str(error).removeprefix("flag ").partition(": (")[0].partition("=")
        raise flags.Error(f"{name}={value}: write {name} without '='") from error
    except (AttributeError, KeyError, TypeError) as error:  # the config lacks the key, or its value has another type
        raise ValueError(f"--config: {_of_config(error)}") from error
    if rest and not positional:
        raise flags.Error(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    if positional and not rest:
        raise flags.Error(f"name at least one {positional}")
    for name in required:
        if fv[name].value in (None, []):
            raise flags.Error(f"--{name} is missing; `fastvlm {argv[0]} --help` explains the flags")
    return rest


def _of_config(error: Exception) -> str:
    """Returns in a line what is wrong with the override of a config key."""
    text, _, near = str(error).partition('Did you mean "')
    missing = re.fullmatch(r"\W*([\w.]+)\W*", text.replace("\\n", ""))  # ml_collections gives the key alone, quoted
    if not missing:
        return str(error).strip().splitlines()[0]
    from fastvlm_jax.config import REPLACED

    if missing[1] in REPLACED:
        return f"there is no key {missing[1]!r} any more: {REPLACED[missing[1]]}"
    near, _, _ = near.partition('"')
    tip = f" (did you mean {near}?)" if near else ""
    return f"there is no key {missing[1]!r}{tip}; docs/config.md lists the keys"


def numbers(fv: flags.FlagValues, name: str, kind: type, words: str) -> tuple:
    """Returns the numbers, int or float, that a flag lists.

    Raises:
      flags.Error: it lists something else; `words` say what it must be.
    """
    try:
        return tuple(map(kind, fv[name].value))
    except ValueError as error:
        raise flags.Error(f"--{name}={','.join(fv[name].value)} must be {words}") from error


def to_json(content: dict, path: str | None) -> str:
    """Returns `content` as JSON, and writes it to `path` if there is one."""
    if path:
        from fastvlm_jax import files

        files.write_json(pathlib.Path(path).expanduser(), content)
    return json.dumps(content, indent=2)


def define_config(fv: flags.FlagValues, argv: list[str], help: str = "config file, FILE.py or FILE.py:ARG") -> None:
    """Defines the flag --config and, for the keys it overrides, --config.KEY.

    Parsing the flag imports the config file, which may import jax: set environment variables for XLA before.
    """
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, help, flag_values=fv, sys_argv=argv)


def define_processes(fv: flags.FlagValues) -> None:
    """Defines the flags that say how the processes of a job meet; see `processes`."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, in a job of several processes", flag_values=fv
    )
    flags.DEFINE_integer(
        "num_processes", None, "processes of the job; default: as many as the platform reports", flag_values=fv
    )
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=fv)
    flags.DEFINE_float(
        "heartbeat_seconds", None, "silence after which a process counts as frozen, s; default 30", flag_values=fv
    )
    flags.DEFINE_float(
        "initialization_seconds", None, "longest wait for all processes to start, s; default 300", flag_values=fv
    )
    flags.DEFINE_float(
        "late_step_seconds", None, "longest wait for a process that is late in a step, s; default 300", flag_values=fv
    )


def processes(fv: flags.FlagValues):
    """Returns how this process meets the others, by its flags or the platform; None for a single process."""
    from fastvlm_jax import distributed

    return distributed.find_settings(
        fv.coordinator_address, fv.num_processes, fv.process_id, fv.heartbeat_seconds, fv.initialization_seconds,
        fv.late_step_seconds,
    )  # fmt: skip
