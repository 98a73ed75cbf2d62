"""Runs `fastvlm preflight`: builds a config's real program for a slice, compiles it and reports what it needs."""

import dataclasses
import importlib.metadata
import math
import sys
from functools import partial
from typing import Any

from fastvlm_jax import config_checks, sharding, stage, xla_flags
from fastvlm_jax.models import kinds
from fastvlm_jax.preflight import describe, estimate, fit, topology
from fastvlm_jax.preflight import search as ranking
from fastvlm_jax.preflight.compile import compile, lower_encoder, lower_generate, lower_step


@dataclasses.dataclass(frozen=True)
class Options:
    """Describes what to compile and report, beside the config and the topology.

    Attributes:
      mode: "train"; "generate"; or "encoder", the forward and backward pass of the encoder alone on `rows` images.
      records: number of records in the stage's data; None counts those of the data sets that the paper names.
      top: number of costly operations to list.
      rows: prompts to generate for, with one image each; in mode "encoder", images.
      prompt_tokens: text tokens per prompt, for generation.
      max_tokens: tokens to generate per prompt.
    """

    mode: str = "train"
    records: int | None = None
    top: int = 10
    rows: int = 1
    prompt_tokens: int = 64
    max_tokens: int = 256


def preflight(config, name: str, options: Options = Options()) -> dict[str, Any]:
    """Compiles a config for the slices `name` and returns the report, JSON-ready; `text` formats it.

    Reads neither data nor a parent's weights. Every time in the report is an estimate.

    Raises:
      ValueError: the topology does not exist, the TPU compiler is missing, or the mesh does not fit the slice or divide
        the batch or the heads.
    """
    slices = topology.parse(name)
    config_checks.validate(config)
    model = kinds.build(**config.model.to_dict())
    mesh = sharding.make_mesh(config.mesh, topology.devices(slices))
    train = options.mode == "train"
    if options.mode == "generate" and "llm" not in config.model:
        raise ValueError("--mode=generate needs a language model, which stage 0 has none of")
    check(config, mesh, slices, config.data.groups if train else options.rows, "data.groups" if train else "--rows")
    asked = {"rows": options.rows, "prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
    lower = {
        "train": partial(lower_step, config, model, mesh),
        "encoder": partial(lower_encoder, config, mesh, rows=options.rows),
        "generate": partial(lower_generate, config, model, mesh, **asked),
    }[options.mode]
    # Only `fastvlm train` sets these flags.
    options_of_compiler = xla_flags.compiler_options("tpu") if train else None
    compiled, state, batch = compile(lower, slices, mesh, options_of_compiler)
    generation = slices.generation
    head = {
        "mode": options.mode,
        "stage_name": config.stage if train else options.mode,
        "topology": {
            "name": name, "chips": slices.chips, "devices": slices.num_devices, "clock_hz": generation.clock,
            "bf16_flops": generation.flops, "hbm_bytes": generation.hbm, "hbm_bytes_per_s": generation.hbm_bandwidth,
            "ici_bytes_per_s_a_link": generation.link, "dcn_bytes_per_s_a_chip": generation.dcn,
        },
        "mesh": dict(mesh.shape),
        "compile": {
            "trace_s": compiled.trace_s, "compile_s": compiled.compile_s, "cached": compiled.cached,
            "count_s": compiled.count_s, "libtpu": importlib.metadata.version("libtpu"),
        },
    }  # fmt: skip
    made = (config, model, slices, mesh, compiled, state, batch)
    if train:
        body = estimate.train_report(*made, options.records, options.top)
        mends = fit.mends(config, slices, mesh, body) if not body["memory"]["fits"] else []
    else:
        encoder = options.mode == "encoder"
        body = estimate.encoder_report(*made, options.top) if encoder else estimate.generate_report(*made, asked)
        mends = ["fewer --rows, or a slice with more chips"] if not body["memory"]["fits"] else []
    return {**head, **body, "mends": mends}


def search(config, name: str, options: Options = Options(), count: int = 3) -> dict[str, Any]:
    """Compiles the config as given and the `count` best candidates of search.rank; returns the report of the best.

    The best is the fastest of those that fit, or the fastest of all if none fits. Its report lists all candidates under
    "search" and names its settings under "best".

    Raises:
      ValueError: as in `preflight`; the mode is not "train"; or no mesh of the slice divides the batch.
    """
    if options.mode != "train":
        raise ValueError("--search ranks training settings: leave out --mode")
    if "llm" not in config.model:
        raise ValueError("--search knows no settings of stage 0: leave it out, and try --config.accumulate or remat")
    slices, rows, best = topology.parse(name), [], None
    config_checks.validate(config)
    own = ranking.given(config, sharding.make_mesh(config.mesh, topology.devices(slices)))
    for candidate in ranking.choose(ranking.rank(config, slices), own, count):
        settings = ranking.flags(candidate.settings, own) or "as given"
        print(f"compiling {settings}", file=sys.stderr, flush=True)
        report = preflight(candidate.apply(config), name, options)
        seconds = report["time"]["scheduled_s"] if "time" in report else math.inf
        fits = report["memory"]["fits"]
        rows.append(
            {
                "settings": settings, "arithmetic_bytes": candidate.bytes, "arithmetic_s": candidate.seconds,
                "bytes": report["memory"]["total"], "fits": fits,
                "scheduled_s": seconds if math.isfinite(seconds) else None,
            }
        )  # fmt: skip
        if best is None or (fits, -seconds) > best[0]:
            best = (fits, -seconds), settings, report
    return {**best[2], "search": rows, "best": best[1]}


def check(config, mesh, slices: topology.Slice, groups: int, key: str) -> None:
    """Checks that the mesh divides the batch and the key-value heads.

    Args:
      groups: number of groups, or of rows in generation, in the batch.
      key: config key or flag that sets `groups`, for the message.

    Raises:
      ValueError: the mesh does not divide them; the message gives settings that it does.
    """
    shards = math.prod(mesh.shape[axis] for axis in sharding.LOGICAL_AXES["batch"])
    if groups % shards and key == "data.groups" and (mended := fit.regrouped(config, shards, config.accumulate)):
        flags = " ".join(f"--config.data.{name}={value}" for name, value in mended.items())
        raise ValueError(
            f"data.groups={groups} does not divide over the {shards} data shards of {slices.name}: set {flags}"
        )
    if groups % shards:
        raise ValueError(f"{key}={groups} does not divide over {shards} data shards: make it a multiple of {shards}")
    if key == "data.groups":
        stage.check_mesh(config, mesh)
    elif "llm" in config.model:
        sharding.check_mesh(mesh, groups=groups, num_kv_heads=config.model.llm.num_kv_heads)


def text(report: dict[str, Any]) -> str:
    """Formats the report for a terminal."""
    made = {
        "train": describe.train_text, "encoder": describe.encoder_text, "generate": describe.generate_text,
    }[report["mode"]](report)  # fmt: skip
    if "search" in report:
        made = f"{describe.search_text(report['search'])}\n\nthe best candidate: {report['best']}\n{made}"
    if report["mends"]:
        made += "\n\nwhat would make it fit (by arithmetic, not compiled):\n" + "\n".join(
            f"  {m}" for m in report["mends"]
        )
    return made
