"""`fastvlm preflight`: builds the real program of a config for a slice, compiles it and reports what it needs."""

import dataclasses
import importlib.metadata
import math
import sys
from functools import partial
from typing import Any

from fastvlm_jax import config as config_lib
from fastvlm_jax import sharding, xla_flags
from fastvlm_jax.models import fastvlm
from fastvlm_jax.preflight import describe, estimate, fit, topology
from fastvlm_jax.preflight import search as ranking
from fastvlm_jax.preflight.compile import compile, lower_encoder, lower_generate, lower_step


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for beside config and topology.

    Attributes:
      mode: "train", "generate", or "encoder": forward and backward pass of the encoder alone, of `rows` images.
      records: of the stage's data; None takes those of the data sets that the paper names.
      top: costly operations to list.
      rows, prompt_tokens, max_tokens: of generation: prompts with an image each, tokens of text, tokens to write.
    """

    mode: str = "train"
    records: int | None = None
    top: int = 10
    rows: int = 1
    prompt_tokens: int = 64
    max_tokens: int = 256


def preflight(config, name: str, options: Options = Options()) -> dict[str, Any]:
    """The report of a config on the slices `name`, JSON-ready; `describe` makes text of it. No data or parent is read.

    Raises:
      ValueError: a topology that does not exist, no TPU compiler, a mesh, batch or heads that do not divide.
    """
    slices = topology.parse(name)
    config_lib.validate(config)
    model = fastvlm.build(**config.model.to_dict())
    mesh = sharding.make_mesh(config.mesh, topology.devices(slices))
    train = options.mode == "train"
    check(config, mesh, slices, config.data.groups if train else options.rows, "data.groups" if train else "--rows")
    asked = {"rows": options.rows, "prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
    lower = {
        "train": partial(lower_step, config, model, mesh),
        "encoder": partial(lower_encoder, config, mesh, rows=options.rows),
        "generate": partial(lower_generate, config, model, mesh, **asked),
    }[options.mode]
    # `fastvlm train` sets these flags, other commands none.
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
            "libtpu": importlib.metadata.version("libtpu"),
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
    """The report of the fastest of the best candidates of search.rank, each compiled; "search" lists them.

    Beside the `count` best by arithmetic, the config as it is given.

    Raises:
      ValueError: as preflight, or no mesh of the slice divides the batch.
    """
    if options.mode != "train":
        raise ValueError("--search ranks training settings: leave out --mode")
    slices, rows, best = topology.parse(name), [], None
    config_lib.validate(config)
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
    """Refuses a batch or heads that the mesh does not divide (ValueError with the settings that it does)."""
    shards = math.prod(mesh.shape[axis] for axis in sharding.LOGICAL_AXES["batch"])
    if groups % shards and key == "data.groups" and (mended := fit.regrouped(config, shards, config.accumulate)):
        flags = " ".join(f"--config.data.{name}={value}" for name, value in mended.items())
        raise ValueError(
            f"data.groups={groups} does not divide over the {shards} data shards of {slices.name}: set {flags}"
        )
    if groups % shards:
        raise ValueError(f"{key}={groups} does not divide over {shards} data shards: make it a multiple of {shards}")
    accumulate = config.accumulate if key == "data.groups" else 1
    kv_heads = config.model.llm.num_kv_heads
    sharding.check_mesh(mesh, groups=groups, num_kv_heads=kv_heads, accumulate=accumulate)


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    made = {
        "train": describe.train_text, "encoder": describe.encoder_text, "generate": describe.generate_text,
    }[report["mode"]](report)  # fmt: skip
    if "search" in report:
        made = f"{describe.search_text(report['search'])}\n\nthe best of them: {report['best']}\n{made}"
    if report["mends"]:
        made += "\n\nwhat would make it fit (by arithmetic, not compiled):\n" + "\n".join(
            f"  {m}" for m in report["mends"]
        )
    return made
