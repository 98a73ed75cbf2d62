"""Estimates the time to the first token on a TPU, part by part: `fastvlm bench ttft --topology v5e:1x1`.

The parts are the programs that `bench ttft` times, each compiled for one chip of the slice; nothing runs on a TPU. What
the host does, decoding and resizing a photo and copying it to the chip, is left out.
"""

import importlib.metadata
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fastvlm_jax import sharding
from fastvlm_jax.bench import first_token, ttft
from fastvlm_jax.bench.first_token import Question
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.preflight import estimate as reading
from fastvlm_jax.preflight import topology
from fastvlm_jax.preflight.compile import Compiled, compile, layer_shape
from fastvlm_jax.preflight.hlo import cost
from fastvlm_jax.preflight.hlo.parse import parse


def estimate(model: FastVLM, name: str, question: Question) -> dict[str, Any]:
    """Returns a point as `bench.ttft.measure` does, JSON-ready, with the TPU compiler's estimates in place of times.

    "fused" is the sum of encoder, projector and prefill. Only the median of a part has a value: a program's estimate is
    always the same. `user_ttft` is None, because it counts what the host does.

    Args:
      name: topology, of which one chip is used.

    Raises:
      ValueError: see `bench.first_token.check` and `topology.parse`; or a program does not fit into a chip's memory.
    """
    image_tokens = first_token.check(model, question)
    slices = topology.parse(name)
    mesh = sharding.make_mesh((1, 1, 1, 1), topology.devices(slices)[:1])
    variables = abstract(nn.unbox(kinds.boxed_variables(model)), mesh, model.dtype)
    variables["params"] = fastvlm.unstacked(model, variables["params"], layer_shape)
    compiled = {
        part: _compile(part, partial(function.lower, model, variables, *args), slices, mesh)
        for part, (function, args) in programs(model, variables, question, mesh).items()
    }
    read = {part: cost.analyse(parse(found.text), 1, found.schedules) for part, found in compiled.items()}
    chip = list(mesh.devices.flat)
    seconds = {part: reading.timing(found, slices, chip)["scheduled_s"] for part, found in read.items()}
    # Each weight is read for one token alone, which takes at least the time of fetching them all.
    seconds["next_token"] = max(seconds["next_token"], reading.fetching_s(read["next_token"], slices))
    seconds["fused"] = seconds["encoder"] + seconds["projector"] + seconds["prefill"]
    return {
        **ttft.describe(model, variables, question, image_tokens),
        "device": f"one chip of {name}",
        "topology": name,
        "measured": False,
        "parts": {part: {"median": value, "p10": None, "p90": None} for part, value in seconds.items()},
        "paper_ttft": seconds["encoder"] + seconds["prefill_image"],
        "user_ttft": None,
        "runs": 0,
        "compile_seconds": {part: found.compile_s for part, found in compiled.items()},
        "peak_bytes": max(_bytes(found) for found in compiled.values()),
        "peak_bytes_of": "memory analysis of the largest compiled program",
        "attention": ttft.attention_kernel(compiled["prefill"].text),
        "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
    }


def abstract(tree: Any, mesh: jax.sharding.Mesh, dtype: str | None = None) -> Any:
    """Returns shapes and dtypes of a tree, placed on the mesh's one chip; parameters have `dtype` if it is given."""
    whole = sharding.NamedSharding(mesh, sharding.P())

    def leaf(path, x):
        own = dtype if dtype and path[0].key == "params" else x.dtype
        return jax.ShapeDtypeStruct(x.shape, own, sharding=whole)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def programs(model: FastVLM, variables: Any, question: Question, mesh: jax.sharding.Mesh) -> dict[str, tuple]:
    """Returns (jitted function, its abstract arguments behind model and variables) of each part."""
    side = question.image_size
    pixels = np.zeros((1, question.batch * question.slots, side, side, 3), np.uint8)
    batch = first_token.make_batch(model, question, pixels)
    alone = first_token.make_batch(model, question._replace(prompt_tokens=0), pixels)
    batch, alone = abstract(batch, mesh), abstract(alone, mesh)

    def shape_of(function, *args):
        return abstract(jax.eval_shape(partial(function, model), variables, *args), mesh)

    features = shape_of(first_token.encoder, batch.images, batch.image_mask)
    projected = shape_of(first_token.projector, features)
    ids_B, cache = shape_of(first_token.prefill, projected, batch)
    return {
        "encoder": (first_token.encoder, (batch.images, batch.image_mask)),
        "projector": (first_token.projector, (features,)),
        "prefill": (first_token.prefill, (projected, batch)),
        "next_token": (first_token.next_token, (ids_B, ids_B, cache)),
        "prefill_image": (first_token.prefill, (projected, alone)),
    }


def _compile(part: str, lower, slices: topology.Slice, mesh: jax.sharding.Mesh) -> Compiled:
    def lowered():
        with jax.set_mesh(mesh):
            return lower(), None, None

    compiled, _, _ = compile(lowered, slices, mesh)
    if compiled.out_of_memory or _bytes(compiled) > slices.generation.hbm_limit:
        raise ValueError(
            f"--topology={slices.name}: {part} does not fit into the memory of one chip: take a chip with more, or "
            "--dtype=bfloat16"
        )
    return compiled


def _bytes(compiled: Compiled) -> float:
    m = compiled.memory
    return m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"] + m["code"]
