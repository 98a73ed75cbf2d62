"""Describes TPU slices for the compiler, without a TPU: published figures of chips, and devices to compile for.

v5e:4x4        a slice of 4 x 4 chips          v5p:4x4x4*2      two slices, joined by the data-center network
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax

from fastvlm_jax.chips import GENERATIONS, Generation
from fastvlm_jax.xla_flags import NO_TPU

# Environment of the TPU compiler when it is loaded: it looks neither for a TPU nor for another process that has one.
ENVIRONMENT = {**NO_TPU, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Describes `num_slices` slices of one shape. The figures of a device are the chip's, divided by its devices.

    Attributes:
      name: the name that was parsed.
      generation: figures of the TPU generation.
      shape: chips along each axis of one slice.
      num_slices: number of slices.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    num_slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.chips * self.generation.devices_per_chip

    @property
    def device_flops(self) -> float:
        return self.generation.flops / self.generation.devices_per_chip

    @property
    def device_bandwidth(self) -> float:
        return self.generation.hbm_bandwidth / self.generation.devices_per_chip

    def is_ring(self, axis: int) -> bool:
        """Returns whether the links along an axis form a ring, so that a transfer can use both directions."""
        if self.generation.ring:
            return self.shape[axis] >= self.generation.ring
        return all(size % 4 == 0 for size in self.shape)


def parse(name: str) -> Slice:
    """Parses a name such as "v5e:4x4" or, for two slices, "v5e:4x4*2".

    Raises:
      ValueError: the generation or the shape does not exist; the message lists those that do.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name.strip())
    if not found:
        raise ValueError(
            f"--topology={name}: write GENERATION:SHAPE, as v5e:4x4, v5p:4x4x4 or, for two slices, v5e:16x16*2"
        )
    kind, shape, slices = found[1].removeprefix("tpu"), tuple(map(int, found[2].split("x"))), int(found[3] or 1)
    kind = {"v5litepod": "v5e", "7x": "v7x"}.get(kind, kind)
    if kind not in GENERATIONS:
        raise ValueError(f"--topology={name}: unknown TPU {found[1]!r}: choose one of {', '.join(GENERATIONS)}")
    generation = GENERATIONS[kind]
    cubes = len(generation.shapes[0]) == 3 and len(shape) == 3 and all(x > 0 and x % 4 == 0 for x in shape)
    if (shape not in generation.shapes and not cubes) or math.prod(shape) > generation.largest or slices < 1:
        shapes = ", ".join("x".join(map(str, s)) for s in generation.shapes)
        more = f" or multiples of 4x4x4 up to {generation.largest} chips" if len(generation.shapes[0]) == 3 else ""
        raise ValueError(f"--topology={name}: {kind} has no such slice: choose {shapes}{more}")
    return Slice(name, generation, shape, slices)


def set_environment() -> None:
    """Prepares this process for the TPU compiler: JAX runs on the CPU, and a TPU of this machine is left alone."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.devices("cpu")  # reads XLA_FLAGS now, for `compiler` hides them


def devices(slices: Slice) -> list:
    """Returns the devices to compile for, one per chip (v7x: two). Programs cannot run on them.

    Raises:
      ValueError: the TPU compiler is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install 'fastvlm_jax[preflight]' (libtpu)")
    set_environment()
    from jax.experimental import topologies

    options = {"num_slices": slices.num_slices} if slices.num_slices > 1 else {}
    if slices.generation.prefix == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as JAX shows a v4; the default is one per core
    shape = "x".join(map(str, slices.shape))
    try:
        with compiler():
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{slices.generation.prefix}:{shape}", **options
            ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={slices.name}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def compiler():
    """Allows calls of the TPU compiler within the block.

    The block hides XLA_FLAGS: the compiler ends the process at a flag that it does not know, such as those for CPUs.
    It also turns off JAX's compilation cache, which writes programs for a topology but fails to read them back without
    a client.
    """
    cached, xla_flags = jax.config.jax_enable_compilation_cache, os.environ.pop("XLA_FLAGS", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        if xla_flags is not None:
            os.environ["XLA_FLAGS"] = xla_flags
