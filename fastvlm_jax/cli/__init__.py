"""Runs the commands of `fastvlm`, each with a file of its own: it parses flags, makes one call and prints."""

import logging
import os
import pathlib
import re
import sys
import threading
import time

from absl import flags
from absl import logging as absl_logging

from fastvlm_jax import disk, xla_flags
from fastvlm_jax.cli import (
    bench,
    chat,
    checkpoint,
    convert,
    data,
    evaluate,
    finetune,
    generate,
    help,
    preflight,
    report,
    sweep,
    train,
)
from fastvlm_jax.cli.arguments import USAGE

COMMANDS = {
    "train": train.train,
    "generate": generate.generate,
    "finetune": finetune.finetune,
    "init": finetune.init,
    "chat": chat.chat,
    "evaluate": evaluate.evaluate,
    "convert": convert.convert,
    "data": data.data,
    "bench": bench.bench,
    "preflight": preflight.preflight,
    "sweep": sweep.sweep,
    "checkpoint": checkpoint.checkpoint,
    "report": report.report,
}
GRACE = 10.0  # seconds that a process has to end after an error


def program() -> None:
    """Runs `main` as the program of a process; after an error the process ends in seconds, whatever threads it leaves.

    Behind a save that failed, threads of Orbax may wait for minutes, and Python would wait for them.
    """
    sys.unraisablehook = _unraisablehook
    try:
        main()
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if status:
            threading.Thread(target=_end, args=(status,), daemon=True).start()
        raise


def _end(status: int) -> None:
    time.sleep(GRACE)
    os._exit(status)


def main() -> None:
    """Runs the command of the command line.

    An error that a user can cause ends in one line on stderr and exit status 1 (2 for wrong usage); FASTVLM_TRACEBACK=1
    shows where it arose. Ctrl-C ends in exit status 130, and SIGTERM, where work is saved for the next start, in 75.
    """
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax logs the stack of every failed write, which it raises too.
    absl_logging.get_absl_logger().addFilter(_is_no_stack_of_orbax)
    flags.FLAGS.mark_as_parsed()  # each command parses its own; absl would warn in every log that these are not parsed
    logging.getLogger("jax").setLevel(logging.ERROR)
    xla_flags.silence_libtpu()
    xla_flags.silence_compiler()
    argv = sys.argv[1:]
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [*argv[1:], "--help"]
    name = ""
    try:
        name = help.choose("fastvlm", argv, COMMANDS, USAGE)
        COMMANDS[name](argv)
    except KeyboardInterrupt as stop:
        print(f"fastvlm {name}: {str(stop) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(stop, "status", 130)) from None
    except BrokenPipeError:  # as `fastvlm --help | head` ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        print(f"fastvlm {name}: a gs:// address needs gcsfs: pip install 'fastvlm_jax[gcs]'", file=sys.stderr)
        raise SystemExit(1) from None
    except (flags.Error, ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        line = _line(error)
        if not line or os.environ.get("FASTVLM_TRACEBACK"):
            raise
        print(f"fastvlm{f' {name}' if name else ''}: {' '.join(line.split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, flags.Error) else 1) from None


def _unraisablehook(unraisable) -> None:
    """Prints an error that nobody can catch, unless a save that failed leaves it behind.

    Orbax closes the event loop of such a save, and TensorStore finds it closed at the end of each write under way.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_no_stack_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in pathlib.PurePath(record.pathname).parts


def _line(error: Exception) -> str:
    """Returns what is wrong and what to do about it; "" for a fault of the program, which needs its traceback."""
    message = str(error).strip()
    if isinstance(error, OSError):
        return disk.describe(error)
    if quoted := disk.error_in(message):
        return disk.describe(quoted)
    if isinstance(error, MemoryError):
        return f"the memory of this machine is too small: {message or 'see what else runs on it'}"
    if isinstance(error, RuntimeError):
        if "RESOURCE_EXHAUSTED" not in message:
            return ""
        return (
            f"a device's memory is too small ({message.splitlines()[0][:200]}): raise accumulate, choose another "
            "remat, or take a slice with more chips; fastvlm preflight estimates what fits"
        )
    if "Traceback" in message:  # the flag library quotes the whole traceback of an error in a config file
        message = re.sub(r"^\w*Error: ", "", message.splitlines()[-1])
    return message.removeprefix("Configuration is not available because of an earlier failure to load: ")
