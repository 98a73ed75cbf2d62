"""Runs `fastvlm finetune` and `fastvlm init`: from pictures and answers to a tuned model, at once or step by step."""

import pathlib

from absl import flags

from fastvlm_jax import xla_flags
from fastvlm_jax.cli.arguments import parse


def finetune(argv: list[str]) -> None:
    """Writes shards, chooses settings, trains, scores before and after, and writes a page; goes on where it stopped."""
    fv = define("pictures and answers: a file or folder of any format that data write reads, or a folder of shards")
    flags.DEFINE_multi_string(
        "images", [], "folder that image names in the data are relative to; default: the data's own", flag_values=fv
    )
    parse(fv, argv, required=("model", "data", "output"))
    from fastvlm_jax.finetune import run

    run.finetune(fv.model, fv.data, pathlib.Path(fv.output).expanduser(), lora=fv.lora, images=fv.images)


def init(argv: list[str]) -> None:
    """Chooses the settings of a fine-tuning run and writes them as a config file with comments."""
    xla_flags.apply()
    fv = define("folder of shards")
    flags.DEFINE_string(
        "device", None, "device to choose for, as gpu:24GB, gpu:8x80GB or cpu:16GB; default: those of this machine",
        flag_values=fv,
    )  # fmt: skip
    parse(fv, argv, required=("model", "data", "output"))
    from fastvlm_jax.finetune import run
    from fastvlm_jax.preflight import gpu

    devices = None if fv.device is None else gpu.usable(gpu.parse(fv.device))
    output = pathlib.Path(fv.output).expanduser()
    print(*run.init(fv.model, fv.data, output, lora=fv.lora, devices=devices), sep="\n")
    print(output / run.CONFIG)


def define(data: str) -> flags.FlagValues:
    """Returns the flags that both commands have; `data` says what --data names."""
    fv = flags.FlagValues()
    flags.DEFINE_string("model", None, "model to tune: a workdir or a model directory of any layout", flag_values=fv)
    flags.DEFINE_string("data", None, data, flag_values=fv)
    flags.DEFINE_string("output", None, "folder for all that is written", flag_values=fv)
    flags.DEFINE_bool("lora", False, "train adapters of low rank in place of all weights", flag_values=fv)
    return fv
