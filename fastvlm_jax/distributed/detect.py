"""Finds out how many processes there are and which one this is: from flags, environment variables or the platform."""

import os
import warnings
from typing import Any

from fastvlm_jax.distributed.rendezvous import Settings

NAMES = ("coordinator_address", "num_processes", "process_id")


def find_settings(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: float | None = None,
    initialization_seconds: float | None = None,
    late_step_seconds: float | None = None,
) -> Settings | None:
    """Returns how this process meets the others, or None for a single process.

    Each argument is the value of the flag of that name. Where it is None, the environment variable counts, then the
    platform (see the docstring of the package).

    Raises:
      ValueError: the settings are incomplete or impossible; the message names the flag or the variable.
    """
    seconds = {
        "heartbeat_seconds": _number("heartbeat_seconds", heartbeat_seconds, float, 30.0),
        "initialization_seconds": _number("initialization_seconds", initialization_seconds, float, 300.0),
        "late_step_seconds": _number("late_step_seconds", late_step_seconds, float, 300.0),
    }
    for name, value in seconds.items():
        if not 0 < value < 1e6:
            raise ValueError(f"--{name}={value:g} must be a positive number of seconds")
    address = coordinator_address or _variable("coordinator_address")[1]
    count = _number("num_processes", num_processes, int)
    process = _number("process_id", process_id, int)
    if count == 1 and process in (None, 0):
        return None
    if None in (address, count, process):
        found = _detect(address, count, process, seconds["initialization_seconds"])
        if found == (None, None, None) or (found[1] == 1 and address is None):
            return None
        missing = [f"--{name}" for name, value in zip(NAMES, found, strict=True) if value is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing: --{', --'.join(NAMES)} (or FASTVLM_{NAMES[0].upper()} and so on) go "
                "together, unless the platform provides them"
            )
        address, count, process = found
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ValueError(f"--coordinator_address={address} must be HOST:PORT, where process 0 listens")
    if not 0 <= process < count:
        raise ValueError(f"--process_id={process} must be from 0 to {count - 1}: --num_processes is {count}")
    return Settings(address, count, process, **seconds)


def _variable(name: str) -> tuple[str, str | None]:
    """Returns the environment variable that sets a flag, and its value; ("", None) if none is set."""
    for prefix in ("FASTVLM", "JAX"):
        if value := os.environ.get(f"{prefix}_{name.upper()}"):
            return f"{prefix}_{name.upper()}", value
    return "", None


def _number(name: str, value: Any, kind: type, default: Any = None) -> Any:
    """Returns the value of a flag; if that is None, of its environment variable; if none is set, the default."""
    variable, text = _variable(name)
    if value is not None or text is None:
        return default if value is None else value
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text!r} must be a number") from error


def _detect(*given) -> tuple[str | None, int | None, int | None]:
    """Returns (address, number, id); values given as None are filled in by the platform."""
    from jax._src.clusters import ClusterEnv  # no public function of jax detects without initializing

    *known, seconds = given
    try:
        with warnings.catch_warnings(action="ignore"):  # about the missing package `kubernetes`
            return ClusterEnv.auto_detect_unset_distributed_params(*known, None, None, int(seconds))[:3]
    except Exception as error:
        raise ValueError(
            f"cannot detect the number of processes and the id of this one ({' '.join(str(error).split())}): give "
            f"--{', --'.join(NAMES)}, or --num_processes=1"
        ) from error
