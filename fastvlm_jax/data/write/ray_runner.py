"""Shares jobs out to a Ray cluster, whose nodes read and write files that all of them see under the same paths.

    driver (this process)                           worker on a node
    puts a token into the folder of the output
    asks every node whether it can work       ──>   the same versions? the token and the sources seen? may it write?
    submits jobs, some more than there are cores    asks itself the same, once; then does the job
    counts what they report                   <──   what is wrong, if anything, and the sums of the job's reports

If a worker or a node dies, Ray runs its job again, on a node that may have joined meanwhile. A job must bear that: its
files get their names when they are whole, and depend on the job alone: an attempt that Ray takes for dead and that
still lives puts the same bytes in place.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import logging
import os
import pathlib
import pickle
import platform
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from fastvlm_jax import disk
from fastvlm_jax.data.write.workers import attempt
from fastvlm_jax.files import write_whole

RETRIES = 3  # of a job whose worker or node died
_AHEAD = 64  # jobs that are submitted at least: those that wait let a cluster grow that grows by demand
_ANSWER_SECONDS = 300  # longest wait for a node to say whether it can work
_REPORT_EVERY = 0.25  # seconds between reports
# Beside this package's own code, they decide the bytes of shards.
_LIBRARIES = (
    "array_record", "msgpack", "numpy", "opencv-python-headless", "pillow", "pypdfium2", "sentencepiece", "simplejpeg",
    "tokenizers",
)  # fmt: skip


class View(NamedTuple):
    """Holds what a node must see to do a job.

    Attributes:
      cwd: folder that relative paths begin in, if the node has it.
      token: file that this run put into the folder of the output, under a name by chance.
      sees: files and folders that the jobs read, local or gs://.
    """

    cwd: str
    token: str
    sees: tuple[str, ...]


def share_out(
    work: Callable[[Any, Callable], None],
    jobs: Sequence[Any],
    on_report: Callable,
    *,
    workers: int,
    address: str | None,
    folder: pathlib.Path,
    sees: Sequence[str],
) -> None:
    """Calls `work(job, report)` for every job on a cluster, as `workers.share_out` does with processes.

    What a job reports arrives when it ends, as one sum: an attempt whose worker died counts for nothing.

    Args:
      work: function of a module.
      jobs: jobs with a `name`, started in order.
      on_report: `on_report(job, *sums)`, then `on_report(job)` when the job is done.
      workers: most jobs at once; 0 for as many as the cluster has cores.
      address: see `connected`.
      folder: folder that the jobs write to.
      sees: files and folders that the jobs read; "" is left out.

    Raises:
      ValueError: there is no cluster, a node cannot work, a job failed, or its worker died too often.
      KeyboardInterrupt: Ctrl-C; or SIGTERM, then its `status` is 75. Jobs at work are cancelled.
    """
    token = folder / f"token.{secrets.token_hex(4)}.partial"  # the next run removes what this one leaves
    write_whole(token, b"")
    view = View(os.getcwd(), os.fspath(token), tuple(filter(None, sees)))
    with connected(address) as ray:
        task = _task(ray)
        _ask_nodes(ray, task, view)
        waiting, at_work = iter(jobs), {}
        try:
            while True:
                most = workers or max(_AHEAD, 2 * int(ray.cluster_resources().get("CPU", 0)))
                for job in itertools.islice(waiting, max(0, most - len(at_work))):  # a cluster may shrink
                    at_work[task.options(name=job.name).remote(pickle.dumps((view, work, job)))] = job
                if not at_work:
                    break
                ended, _ = ray.wait([*at_work], num_returns=len(at_work), timeout=_REPORT_EVERY)
                for reference in ended:
                    job = at_work.pop(reference)
                    if sums := _result(ray, reference, job.name):
                        on_report(job, *sums)
                    on_report(job)
        finally:
            for reference in at_work:
                ray.cancel(reference, force=True)
    token.unlink()


def load() -> Any:
    """Returns the package ray; raises ValueError with the mend if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--runner=ray needs Ray: pip install 'fastvlm_jax[ray]', here and on all nodes") from error
    return ray


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yields the package ray, connected to a cluster within the block; SIGTERM raises KeyboardInterrupt there.

    A cluster that this process is connected to already is used, and stays connected.

    Args:
      address: HOST:PORT of the cluster, or "local"; None for RAY_ADDRESS, or without it a cluster on this machine.

    Raises:
      ValueError: there is no such cluster, or it has other versions of Python or Ray.
    """
    ray, address = load(), address or os.environ.get("RAY_ADDRESS")
    ours, before = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    on_main, terminated = threading.current_thread() is threading.main_thread(), []

    def terminate(*_) -> None:
        terminated.append(True)
        raise KeyboardInterrupt

    try:
        if ours:
            _join(ray, address)
        if on_main:  # Ray's own handler, which it has set now, would end the process without a word
            signal.signal(signal.SIGTERM, terminate)
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints there which workers died
            yield ray
    except KeyboardInterrupt as stop:  # not always the one that `terminate` raised: Ray raises its own
        stop.status = os.EX_TEMPFAIL if terminated else 130
        raise
    finally:
        if ours:
            ray.shutdown()
        if on_main:
            signal.signal(signal.SIGTERM, before)


def _join(ray: Any, address: str | None) -> None:
    if (address or "").startswith("ray://"):
        raise ValueError(f"{address} is for programs elsewhere: run this on a node of the cluster, with --address auto")
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():  # where nobody listens, Ray would try for two minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"no Ray cluster answers at {address} ({error}): `ray start --head` prints the address of its own"
            ) from error
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip()
        if "Traceback" in reason:
            reason = reason.splitlines()[-1]
        name = address or "of this machine"
        raise ValueError(f"the Ray cluster {name} cannot be joined: {' '.join(reason.split())[:300]}") from error


def _task(ray: Any) -> Any:
    """Returns the remote function that calls `serve` on a node which has the versions of this machine.

    It is defined inside a function, and so travels by value: a node may lack this package, or have another version.
    """
    mine = versions()

    def job(packed: bytes) -> tuple[str, Sequence[int]]:
        try:
            from fastvlm_jax.data.write import ray_runner

            theirs = ray_runner.versions()
        except (ImportError, AttributeError) as error:
            theirs = mine | {"fastvlm_jax": f"none that can be used ({error})"}
        other = [f"{name} {theirs.get(name)} (here {mine[name]})" for name in mine if theirs.get(name) != mine[name]]
        if other:
            return f"node {platform.node()} has {', '.join(other)}: install the same on all nodes", ()
        return ray_runner.serve(packed)

    return ray.remote(max_retries=RETRIES)(job)


@functools.cache
def versions() -> dict[str, str]:
    """Returns what decides the bytes of shards: a digest of this package's code, and the versions of libraries."""
    package, code = pathlib.Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode() + path.read_bytes())
    found = {"fastvlm_jax": f"of code {code.hexdigest()[:12]}"}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def serve(packed: bytes) -> tuple[str, Sequence[int]]:
    """Does a job on a node; returns what is wrong, "" if nothing is, and the sums of what the job reports.

    Args:
      packed: pickled (View, work, job); without work it is only asked whether the node could do a job.
    """
    view, work, job = pickle.loads(packed)
    if unseen := _unseen(view):
        return f"node {platform.node()} {unseen}", ()
    if work is None:
        return "", ()
    sums: list[int] = []

    def report(*counts: int) -> None:
        sums[:] = [count + before for count, before in itertools.zip_longest(counts, sums, fillvalue=0)]

    wrong = attempt(work, job, report)
    return f"{wrong} (on node {platform.node()})" if wrong else "", sums


@functools.lru_cache(maxsize=1)  # each worker asks itself once
def _unseen(view: View) -> str:
    """Returns why this node can do no job, "" if it can."""
    with contextlib.suppress(OSError):
        os.chdir(view.cwd)
    token, folder = pathlib.Path(view.token), pathlib.Path(view.cwd, view.token).parent
    mend = "all nodes need it under the same path, on a file system that they share"
    try:
        if not token.is_file():
            return f"does not see what this machine wrote to {folder}: {mend}"
        with tempfile.TemporaryFile(dir=token.parent):
            pass
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror}): {mend}"
    for path in view.sees:
        try:
            if not epath.Path(path).expanduser().exists():
                return f"does not see {path}: {mend}"
        except Exception as error:  # the client of a bucket raises many kinds
            return f"cannot read {path}: {type(error).__name__} {error}"[:300]
    return ""


def _ask_nodes(ray: Any, task: Any, view: View) -> None:
    """Raises ValueError if a node cannot do a job; the message names one. Nodes that join later ask themselves."""
    packed, asked = pickle.dumps((view, None, None)), {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            asked[task.options(**options).remote(packed)] = node["NodeManagerHostname"]
    if not asked:
        disk.tell("no node of the cluster has a core for jobs yet: waiting for one")
        return
    answered, silent = ray.wait([*asked], num_returns=len(asked), timeout=_ANSWER_SECONDS)
    wrong = [f"node {asked[one]} did not answer for {_ANSWER_SECONDS} s: see whether its disks hang" for one in silent]
    for one in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # the node has died meanwhile
            wrong += filter(None, [ray.get(one)[0]])
    if wrong:
        raise ValueError(wrong[0] + (f" (and so with {len(wrong) - 1} more nodes)" if wrong[1:] else ""))


def _result(ray: Any, reference: Any, name: str) -> Sequence[int]:
    """Returns the sums of a job that has ended, or raises ValueError."""
    try:
        wrong, sums = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from error
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"{name} lost its worker {RETRIES + 1} times ({str(error).strip().splitlines()[0]}): run the same command "
            "again to go on, with fewer --workers if memory is short"
        ) from error
    if wrong:
        raise ValueError(wrong)
    return sums
