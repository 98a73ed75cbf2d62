"""Traces the real train step, or generation, with abstract inputs and compiles it for a slice; caches results on disk.

JAX's own compilation cache cannot read programs for a topology back (it needs devices). So this file caches what
preflight needs of a compiled program: its text and its memory.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import lzma
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax import files, sharding, stage
from fastvlm_jax.batch import Batch
from fastvlm_jax.generate import generate_tokens
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.preflight import schedules
from fastvlm_jax.preflight.hlo.parse import parse
from fastvlm_jax.preflight.hlo.schedule import Schedule
from fastvlm_jax.preflight.topology import Slice, compiler

FOLDER = "preflight"
_VERSION = 3  # version of the cached results
STEPS = 10_000  # steps of the schedule: a constant of the program, without effect on its cost


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Holds what preflight reads of a compiled program.

    Attributes:
      text: scheduled HLO; "" if the compiler refused the program for its size.
      memory: bytes per device: arguments, outputs, aliased, temporaries, code; {} if the compiler refused the program.
      schedules: counts of the final schedule of each Pallas kernel, by the name of its instruction; those that the
        compiler refuses alone are missing.
      flops: the compiler's own count of FLOPs, with every loop body counted once.
      out_of_memory: the compiler's message if it refused the program, else "".
      trace_s: seconds that tracing took when the program was compiled.
      compile_s: seconds that compilation took.
      cached: whether the result was read from the cache.
      count_s: seconds that counting the kernels took; those of an earlier program cost nothing.
    """

    text: str
    memory: dict[str, int]
    schedules: dict[str, Schedule]
    flops: float
    out_of_memory: str
    trace_s: float
    compile_s: float
    cached: bool
    count_s: float


def lower_step(config, model: Model, mesh: jax.sharding.Mesh):
    """Lowers the train step that `fastvlm train` runs on the mesh: (lowered step, abstract state, abstract batch)."""
    sources = 1 if config.data.path else max(1, len(config.data.mixture))  # as from_config.open_sources
    with jax.set_mesh(mesh):
        step = stage.make_step(config, model, mesh, steps=STEPS, num_sources=sources)
        batch = stage.abstract_batch(config, model, mesh)
        return step.fn.lower(step.abstract, batch), step.abstract, batch


def lower_generate(config, model: FastVLM, mesh: jax.sharding.Mesh, *, rows: int, prompt_tokens: int, max_tokens: int):
    """Lowers `generate_tokens` for `rows` prompts with one image each: (lowered, abstract variables, abstract batch).

    Parameters have the dtype of the computation.
    """
    side, N = config.data.image_size, 1
    tokens = model.tokens_per_image(side) + prompt_tokens
    layout = sharding.batch_sharding(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=layout)

    names = ("tokens", "image_index", "targets", "segment_ids", "positions", "source")
    batch = Batch(
        images=array(jnp.uint8, N, side, side, 3),
        image_mask=array(bool, N),
        loss_mask=array(bool, 1, tokens),
        **{name: array(jnp.int32, 1, tokens) for name in names},
    )
    with jax.set_mesh(mesh):
        boxed = kinds.boxed_variables(model)
        layouts = sharding.shardings_of(boxed, mesh)

        def abstract(path, x, layout):
            dtype = model.dtype if path[0].key == "params" else x.dtype
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=layout)

        variables = jax.tree_util.tree_map_with_path(abstract, nn.unbox(boxed), layouts)
        variables["params"] = fastvlm.unstacked(model, variables["params"], layer_shape)  # as model_io.load does
        whole = sharding.NamedSharding(mesh, sharding.P())
        rng = jax.eval_shape(jax.random.key, 0)
        rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=whole)
        # Any end token will do: the program is only compiled, and no row is generated.
        generation = jax.jit(functools.partial(generate_tokens, model, max_tokens=max_tokens, end=0))
        lowered = generation.lower(variables, batch, rng)
    return lowered, variables, batch


def layer_shape(stacked: jax.ShapeDtypeStruct, _: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of one layer of a stacked parameter, laid out as `model_io.load` does."""
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=sharding.of_layer(stacked.sharding))


def lower_encoder(config, mesh: jax.sharding.Mesh, *, rows: int):
    """Lowers the encoder's forward and backward pass alone: (lowered, abstract variables, abstract images).

    The input is `rows` images; the loss is the sum of the output times a given array; gradients are those of all
    parameters of the encoder.
    """
    model = fastvlm.build(vision=config.model.vision.to_dict(), dtype=config.model.dtype)
    side, layout = config.data.image_size, sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        boxed = kinds.boxed_variables(model)
        variables = jax.tree.map(
            lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
            nn.unbox(boxed),
            sharding.shardings_of(boxed, mesh),
        )
        images = jax.ShapeDtypeStruct((rows, 1, side, side, 3), jnp.uint8, sharding=layout)

        def encode(params, stats, images):
            return model.apply(
                {"params": params, **stats}, images, train=True, mutable=["batch_stats"], method="encode"
            )

        stats = {name: tree for name, tree in variables.items() if name != "params"}
        shape = jax.eval_shape(encode, variables["params"], stats, images)[0].shape
        cotangent = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

        def encoder_step(params, stats, images, cotangent):
            def loss(params):
                y, updated = encode(params, stats, images)
                return jnp.sum(y.astype(jnp.float32) * cotangent), updated

            return jax.value_and_grad(loss, has_aux=True)(params)

        return jax.jit(encoder_step).lower(variables["params"], stats, images, cotangent), variables, images


def compile(
    lower, slices: Slice, mesh: jax.sharding.Mesh, options: dict[str, str] | None = None
) -> tuple[Compiled, Any, Any]:
    """Traces a program with `lower()` and compiles it, or reads the result of the same program from the cache.

    Args:
      lower: function that returns (lowered program, abstract state or variables, abstract batch).
      slices: slices to compile for.
      mesh: mesh of the slices' devices; the order of its devices is part of the cache key.
      options: compiler options, as xla_flags.compiler_options gives them.

    Returns:
      (Compiled, abstract state or variables, abstract batch).
    """
    begin = time.monotonic()
    with compiler():
        lowered, state, batch = lower()
        text = lowered.as_text()
        traced = time.monotonic() - begin
        file = cache_folder() / f"{_key(text, slices, mesh, options)}.json.xz"
        if file.is_file():
            print(
                f"preflight: traced in {traced:.0f} s; compiled before, read from {file}", file=sys.stderr, flush=True
            )
            kept = json.loads(lzma.decompress(file.read_bytes()))
            return _counted(kept, slices, cached=True), state, batch
        print(
            f"preflight: traced in {traced:.0f} s; compiling for {slices.name}, for a full-size model 1 to 10 minutes",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        begin = time.monotonic()
        compiled, text, refused = None, "", ""
        try:
            compiled, text = compile_with_text(lowered, options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
                raise
            refused = " ".join(str(error).split())
    kept = {
        "text": text,
        "memory": _memory(compiled.memory_analysis()) if compiled else {},
        "flops": float(compiled.cost_analysis().get("flops", 0)) if compiled else 0.0,
        "out_of_memory": refused,
        "trace_s": round(traced, 2),
        "compile_s": round(time.monotonic() - begin, 2),
    }
    files.write_whole(file, lzma.compress(json.dumps(kept).encode(), preset=0))
    return _counted(kept, slices, cached=False), state, batch


def compile_with_text(lowered, options: dict[str, str] | None = None) -> tuple[Any, str]:
    """Compiles a lowered program inside `topology.compiler`: (compiled program, its scheduled HLO).

    The text is what the compiler writes, not `compiled.as_text()`: jaxlib cannot read all of libtpu's programs, those
    for v7x that sum on its SparseCores, for example.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options={**(options or {}), **dump})
        (file,) = pathlib.Path(folder).glob("*.after_codegen.txt")
        return compiled, file.read_text()


def _counted(kept: dict[str, Any], slices: Slice, cached: bool) -> Compiled:
    """Makes a result of what the cache keeps of a program, and counts its kernels."""
    begin = time.monotonic()
    found = schedules.count(parse(kept["text"]), slices, cache_folder() / "kernels") if kept["text"] else {}
    return Compiled(**kept, schedules=found, cached=cached, count_s=round(time.monotonic() - begin, 2))


def _memory(stats) -> dict[str, int]:
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }


def _key(text: str, slices: Slice, mesh: jax.sharding.Mesh, options: dict[str, str] | None) -> str:
    """Returns the name of a program in the cache: a digest of all that its compilation depends on."""
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    flags = [os.environ.get("LIBTPU_INIT_ARGS", ""), options or {}]
    order = [device.id for device in mesh.devices.flat]
    about = json.dumps([_VERSION, versions, flags, slices.generation.prefix, slices.shape, slices.num_slices, order])
    return hashlib.sha256((about + text).encode()).hexdigest()[:24]


def cache_folder() -> pathlib.Path:
    """Returns the folder of cached results: $FASTVLM_CACHE/preflight, else ~/.cache/fastvlm_jax/preflight."""
    return files.cache_folder() / FOLDER


def device_bytes(tree) -> int:
    """Returns the bytes of a tree of sharded arrays on one device, without the compiler's padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree)
    )


def _itemsize(dtype) -> int:
    return 4 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else dtype.itemsize


def needed(message: str) -> float:
    """Returns the bytes that a program needs according to the compiler's out-of-memory message; 0 if it gives none."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message) or re.search(r"Used ([\d.]+)([KMGT])", message)
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else 0.0
