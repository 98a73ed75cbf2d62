"""Which process of how many this one is: from flags, the environment or the platform."""

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
) -> Settings | None:
    """What flags, environment and platform say (see above); None for one process alone.

    Raises:
      ValueError: they say only a part, or what cannot be.
    """
    seconds = {
        "heartbeat_seconds": _number("heartbeat_seconds", heartbeat_seconds, float, 30.0),
        "initialization_seconds": _number("initialization_seconds", initialization_seconds, float, 300.0),
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
                "together, unless the platform is one that tells them"
            )
        address, count, process = found
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ValueError(f"--coordinator_address={address} must be HOST:PORT, of process 0")
    if not 0 <= process < count:
        raise ValueError(f"--process_id={process} must be from 0 to {count - 1}: --num_processes is {count}")
    return Settings(address, count, process, **seconds)


def _variable(name: str) -> tuple[str, str | None]:
    """The environment variable that sets a flag, and its value."""
    for prefix in ("FASTVLM", "JAX"):
        if value := os.environ.get(f"{prefix}_{name.upper()}"):
            return f"{prefix}_{name.upper()}", value
    return "", None


def _number(name: str, value: Any, kind: type, default: Any = None) -> Any:
    variable, text = _variable(name)
    if value is not None or text is None:
        return default if value is None else value
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text!r} must be a number") from error


def _detect(*given) -> tuple[str | None, int | None, int | None]:
    """(address, number, id) with what the platform tells in the place of what is None."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; public is only the whole

    *known, seconds = given
    try:
        with warnings.catch_warnings(action="ignore"):  # that the package `kubernetes` is missing
            return ClusterEnv.auto_detect_unset_distributed_params(*known, None, None, int(seconds))[:3]
    except Exception as error:
        raise ValueError(
            f"the platform does not tell which process of how many this is ({' '.join(str(error).split())}): give "
            f"--{', --'.join(NAMES)}, or --num_processes=1"
        ) from error
