"""Compiles Pallas kernels one by one and counts their schedules: a process that schedules.py starts.

    python -m fastvlm_jax.preflight.compile_kernels TOPOLOGY KERNELS COUNTS

KERNELS is a folder with one JSON file a kernel; COUNTS gets a file of the same name with what was counted. The compiler
reads the flags that ask for schedules from the environment, once, when it is loaded, and takes no option for one
program; hence a process for this alone.
"""

import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from fastvlm_jax import files
from fastvlm_jax.preflight import topology
from fastvlm_jax.preflight.hlo import schedule
from fastvlm_jax.preflight.hlo.schedule import Schedule

_CALL = "ffi_call"  # how JAX names the call of a kernel below
_FILE = re.compile(rf"\d+-{_CALL}[.\d]*-\d+-final_bundles\.txt")
_TYPES = {"pred": "bool", "bf16": "bfloat16"}
_LETTERS = {"f": "float", "s": "int", "u": "uint"}


def flags(folder: str) -> str:
    """Returns the compiler's flags to write the last of some seventy schedules of each kernel, and of no fusion."""
    return (
        f"--xla_jf_dump_to={_dump(folder)} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_to_filter=pass=^final_bundles$,module=^{_CALL}"
    )


def _dump(folder: str) -> pathlib.Path:
    return pathlib.Path(folder) / "dump"


def main(name: str, kernels: str, counts: str) -> None:
    """Counts all kernels of a folder; each that fails is one line on stderr."""
    device = topology.devices(topology.parse(name))[0]
    for file in sorted(pathlib.Path(kernels).glob("*.json")):
        kernel = files.read_object(file)
        for old in _dump(kernels).glob("*"):
            old.unlink()
        try:
            with topology.compiler():
                lower(kernel, device).compile()
            files.write_json(pathlib.Path(counts) / file.name, _count(_dump(kernels))._asdict())
        except Exception as error:  # the compiler's and the parser's, of many kinds
            print(f"{kernel['name']}: {type(error).__name__} {' '.join(str(error).split())}", file=sys.stderr)


def lower(kernel: dict[str, Any], device) -> jax.stages.Lowered:
    """Lowers a program of one kernel for one device.

    Args:
      kernel: {"settings": text for the compiler, "operands" and "results": [type of HLO, sizes] of each, "aliases":
        [operand, result] of those that share memory}.
      device: device of a topology.
    """
    here = jax.sharding.SingleDeviceSharding(device)
    operands = [jax.ShapeDtypeStruct(sizes, _dtype(kind), sharding=here) for kind, sizes in kernel["operands"]]
    call = jax.ffi.ffi_call(
        "tpu_custom_call",
        [jax.ShapeDtypeStruct(sizes, _dtype(kind)) for kind, sizes in kernel["results"]],
        input_output_aliases=dict(kernel["aliases"]),
        custom_call_api_version=1,
        legacy_backend_config=kernel["settings"],
    )
    given_up = [operand for operand, _ in kernel["aliases"]]
    return jax.jit(call, donate_argnums=given_up).lower(*operands)


def _dtype(kind: str) -> jnp.dtype:
    """Returns the dtype of HLO's f32, s8, bf16, pred, f8e4m3fn, ..."""
    found = re.fullmatch(r"([fsu])(\d+)(\w*)", kind)
    if found:
        return jnp.dtype(_LETTERS[found[1]] + found[2] + ("_" + found[3] if found[3] else ""))
    return jnp.dtype(_TYPES.get(kind, kind))


def _count(folder: pathlib.Path) -> Schedule:
    """Counts the one schedule in a folder."""
    written = [file for file in folder.glob("*") if _FILE.fullmatch(file.name)]
    if len(written) != 1:
        raise ValueError(f"the compiler wrote {len(written)} schedules, not one")
    return schedule.count(written[0].read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
