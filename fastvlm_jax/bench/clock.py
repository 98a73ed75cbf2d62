"""Times functions side by side: compiled before the clock starts, warmed up, in turns, each run waited for.

program, compile_seconds = compile_ahead(jax.jit(f), x)
times = take_turns({"f": lambda: program(x), "g": other}, runs=20, warmup=3)
spread(times["f"])                       {"median": 0.0123, "p10": 0.0121, "p90": 0.0131}
"""

import ctypes
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

STATUS = pathlib.Path("/proc/self/status")  # of this process, on Linux


def compile_ahead(fn: Any, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Traces and compiles a jitted function for these arguments: (program to call, seconds that this took)."""
    start = time.perf_counter()
    program = fn.lower(*args, **kwargs).compile()
    return program, time.perf_counter() - start


def take_turns(calls: Mapping[str, Callable[[], Any]], runs: int, warmup: int) -> dict[str, list[float]]:
    """Runs every function `warmup` times, then `runs` times on the clock; returns the seconds of its runs, by name.

    The functions take turns, run by run, so that other work on the machine slows all of them alike. A run ends when all
    arrays that it returns are there: JAX only starts the work when a program is called.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + runs):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median and the 10th and 90th percentile, interpolated between runs."""
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def peak_memory(device: jax.Device, programs: Sequence[Any]) -> tuple[int, str]:
    """Returns a peak of memory in bytes, and which one it is.

    It is the device's own count, of all that this process did so far. A CPU keeps none: then it is what the largest of
    the compiled programs needs at once, with its arguments and results.
    """
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "most in use on the device since the command began"
    return max(program_bytes(program) for program in programs), "memory analysis of the largest compiled program"


def program_bytes(program: Any) -> int:
    """Returns the bytes that a compiled program needs at once: arguments, results, temporaries and code."""
    stats = program.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def resident() -> int | None:
    """Returns the bytes that this process holds, what it freed given back before; None where Linux does not say."""
    if not STATUS.is_file():
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return _kilobytes("VmRSS")


def most_resident(call: Callable[[], Any]) -> int | None:
    """Runs a function and returns the most bytes that this process held meanwhile; None where Linux does not say."""
    before = resident()
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the count begins anew
    except OSError:
        before = None
    call()
    return None if before is None else _kilobytes("VmHWM")


def _kilobytes(name: str) -> int:
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1])


def device_name(device: jax.Device) -> str:
    """Returns the name of a device, as "NVIDIA H100 80GB HBM3" or, of a CPU, its model and number of cores."""
    if device.platform != "cpu":
        return device.device_kind
    file = pathlib.Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return f"{named[1].strip() if named else platform.machine()}, {usable_cores()} cores"


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of Python, of JAX and of other installed packages."""
    names = ("jax", "jaxlib", *packages)
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in names}}
