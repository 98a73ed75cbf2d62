"""Says in a line what is wrong with a disk, and what mends it; prints lines where the disk may be full."""

import errno
import os
import re
import sys

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # nothing is lost but the space
_AGAIN = ", then run the same command again"
_MENDS = {
    errno.ENOSPC: f"make space on that disk{_AGAIN}",
    errno.EDQUOT: f"remove files or ask for a larger quota{_AGAIN}",
    errno.EROFS: f"mount that disk for writing{_AGAIN}, or choose another folder",
    errno.EACCES: "have its owner give you the right, or choose another place",
    errno.EFBIG: f"raise the limit of a file's size (ulimit -f){_AGAIN}",
    errno.EIO: f"see the system's log for what the disk has{_AGAIN}",
    errno.ESTALE: f"mount the file system again{_AGAIN}",
}


def describe(error: OSError) -> str:
    """Returns "FILE: what is wrong: what mends it" of a system's error that names a file, else its own words."""
    if not isinstance(error.filename, str | os.PathLike) or not error.strerror:
        return str(error)
    wrong, mend = error.strerror, _MENDS.get(error.errno)
    if error.errno == errno.ENOSPC and _lacks_inodes(error.filename):
        wrong, mend = "its disk has no inode left for a new file", f"remove files there, of any size{_AGAIN}"
    return f"{error.filename}: {wrong}" + (f": {mend}" if mend else "")


def error_in(message: str) -> OSError | None:
    """Returns the system's error that a library's message quotes, with the first path in it; None if it quotes none.

    TensorStore and XLA call a full disk RESOURCE_EXHAUSTED, which for XLA is the memory of a device too:

        RESOURCE_EXHAUSTED: ... database at local file "/runs/a/checkpoints/8/": ... [os_error_code='28']
        RESOURCE_EXHAUSTED: /runs/a/profile/host.xplane.pb; No space left on device
        No space left on device (os error 28)
    """
    quoted = re.search(r"\bos[_ ]error(?:_code)?[ =]'?(\d+)", message)
    full = [number for number in FULL if "RESOURCE_EXHAUSTED" in message and os.strerror(number) in message]
    if not quoted and not full:
        return None
    number = int(quoted[1]) if quoted else full[0]
    path = re.search(r"(?<![\w/])/[^\s\"'\\;,]*[^\s\"'\\;,:.)]", message)
    return OSError(number, os.strerror(number), path and path[0])


def tell(line: str) -> None:
    """Prints a line to stderr, which may itself be a file on a full disk."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in FULL:
            raise


def _lacks_inodes(path: str | os.PathLike) -> bool:
    """Returns whether the file system of a path, or of the nearest folder that there is, has no free inode."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    return found.f_files > 0 and found.f_favail == 0  # btrfs and network file systems count none
