"""Counts the Pallas kernels of a compiled program by their final schedules, and keeps the counts on disk.

A compiler that is asked for schedules no longer shares what it compiles between equal fusions, and takes several times
as long for a whole program. So a program is compiled without, and then each distinct kernel in it alone:

    compiled program  ->  kernels, each once  ->  counts kept of other programs
                                              ->  the others: a process of compile_kernels.py, one after the other

An operand that the program holds in on-chip memory is then fetched from HBM, which adds some bundles a grid step.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from fastvlm_jax import files
from fastvlm_jax.preflight import compile_kernels
from fastvlm_jax.preflight.hlo import mosaic
from fastvlm_jax.preflight.hlo.parse import Computation, Instruction, Module, arrays
from fastvlm_jax.preflight.hlo.schedule import Schedule
from fastvlm_jax.preflight.topology import Slice

_VERSION = 1  # version of the counts on disk
# What the compiler adds to a kernel's settings: it depends on the program around the kernel.
_ADDED = ("aliasing_operands", "retry_config", "used_scoped_memory_configs")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}")


def count(module: Module, slices: Slice, folder: pathlib.Path) -> dict[str, Schedule]:
    """Returns the counts of the kernels of a compiled program, by the name of their instruction.

    No failure ends it: kernels that cannot be counted are missing, and a line on stderr tells of them.

    Args:
      module: the compiled program.
      slices: any slices of the TPU generation that it was compiled for.
      folder: folder of the counts that are kept, one file a kernel.
    """
    digests, kernels = {}, {}
    for computation in module.computations.values():
        for instruction in filter(mosaic.is_kernel, computation.instructions):
            try:
                kernel = _kernel(computation, instruction)
            except ValueError:  # its settings are written in another way
                continue
            digests[instruction.name] = _digest(kernel, instruction, slices)
            kernels.setdefault(digests[instruction.name], kernel)
    found = _kept(folder, kernels)
    if missing := {digest: kernel for digest, kernel in kernels.items() if digest not in found}:
        print(
            f"preflight: counting the schedules of {len(missing)} kernels, {len(found)} more are known",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        error = _compile(missing, slices, folder)
        found |= _kept(folder, missing)
        if lost := [kernel["name"] for digest, kernel in missing.items() if digest not in found]:
            print(f"preflight: no schedule of {', '.join(lost)}: {error}", file=sys.stderr, flush=True)
    return {name: found[digest] for name, digest in digests.items() if digest in found}


def _kernel(computation: Computation, instruction: Instruction) -> dict[str, Any]:
    """Returns all that compiling a kernel alone needs, JSON-ready: see compile_kernels.lower."""
    settings = mosaic.settings(instruction.attributes)
    operands = [array for name in instruction.operands for array in arrays(computation.by_name[name].shape)]
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?)\}, \w+=", instruction.attributes)
    return {
        "name": instruction.name,
        "settings": json.dumps({key: value for key, value in settings.items() if key not in _ADDED}, sort_keys=True),
        "operands": [[kind, sizes] for kind, sizes, _ in operands],
        "results": [[kind, sizes] for kind, sizes, _ in arrays(instruction.shape)],
        "aliases": [[int(at), int(result or 0)] for result, at in _ALIAS.findall(aliases[1] if aliases else "")],
    }


def _digest(kernel: dict[str, Any], instruction: Instruction, slices: Slice) -> str:
    """Returns the name of a kernel among the counts: a digest of all that its compilation depends on.

    Its name, and the places of its lines in source code, are left out.
    """
    settings, text = kernel["settings"], mosaic.module_text(instruction.attributes)
    if text:
        settings = [re.sub(r'"body": "[^"]*"', "", settings), text]
    about = [_VERSION, importlib.metadata.version("libtpu"), os.environ.get("LIBTPU_INIT_ARGS", "")]
    about += [slices.generation.prefix, settings, *(kernel[key] for key in ("operands", "results", "aliases"))]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def _kept(folder: pathlib.Path, digests: Iterable[str]) -> dict[str, Schedule]:
    """Returns the counts that the folder has; a file that cannot be read counts as none."""
    found = {}
    for digest in digests:
        try:
            found[digest] = Schedule(**files.read_object(folder / f"{digest}.json"))
        except (OSError, TypeError, ValueError):
            continue
    return found


def _compile(kernels: dict[str, dict[str, Any]], slices: Slice, folder: pathlib.Path) -> str:
    """Compiles kernels in a process of its own, which writes their counts; returns the last line of its errors."""
    generation = slices.generation
    topology = f"{generation.prefix}:{'x'.join(map(str, generation.shapes[0]))}"
    try:
        with tempfile.TemporaryDirectory(prefix="fastvlm_kernels_") as work:
            for digest, kernel in kernels.items():
                files.write_json(pathlib.Path(work) / f"{digest}.json", kernel)
            flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {compile_kernels.flags(work)}".strip()
            done = subprocess.run(
                [sys.executable, "-m", compile_kernels.__name__, topology, work, str(folder)],
                env={**os.environ, "LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
    except OSError as error:
        return str(error)
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
