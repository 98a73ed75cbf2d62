"""Watches for the platform's notice that this machine is about to be taken away.

The metadata server of a Google Cloud machine tells of a preemption 30 seconds before it, and of maintenance that stops
the machine 60 seconds before it or earlier. JAX's preemption service would not see either: it listens to SIGTERM alone,
which comes later, and on some platforms not at all.

Source: https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice,
https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
"""

import contextlib
import http.client
import os
import pathlib
import threading
from collections.abc import Callable

# Key of the metadata -> the value with which it announces the end of this machine.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
ASK_SECONDS = 2.0  # between two questions
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")  # names Google on its machines, in containers too


def watch(tell: Callable[[str], None], ended: threading.Event) -> None:
    """Asks the metadata server until `ended` is set or a notice appears, and then calls `tell` once with its key.

    It returns at once where there is no such server: $GCE_METADATA_HOST names one (HOST or HOST:PORT), and machines of
    Google have one. A notice that stands when the watch begins is not told: a run that was stopped for it and started
    again there makes use of the time left.
    """
    if (host := find_server()) is None:
        return
    before = standing(host)
    while not ended.wait(ASK_SECONDS):
        if appeared := standing(host) - before:
            tell(min(appeared))
            return


def find_server() -> str | None:
    """Returns the address of the metadata server; None on other machines, which are asked nothing."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with contextlib.suppress(OSError):
        if PRODUCT.read_text().startswith("Google"):
            return "metadata.google.internal"
    return None


def standing(host: str) -> set[str]:
    """Returns the keys of the notices that stand now; without those that the server does not answer."""
    return {key for key, value in NOTICES.items() if ask(host, key) == value}


def ask(host: str, key: str) -> str:
    """Returns the value of a key of this machine's metadata; "" without an answer of Google's server."""
    try:
        with contextlib.closing(http.client.HTTPConnection(host, timeout=5)) as server:
            server.request("GET", f"/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"})
            answer = server.getresponse()
            known = answer.status == 200 and answer.getheader("Metadata-Flavor") == "Google"
            return answer.read(100).decode(errors="replace").strip() if known else ""
    except (OSError, http.client.HTTPException):
        return ""
