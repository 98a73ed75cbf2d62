"""Says how the commands of a sweep are started: on this machine, or by a script of launch/ on a platform."""

import dataclasses
import pathlib
import sys

from etils import epath

from fastvlm_jax.sweep.plan import Task

# The command of a process that ends when the one that started it ends, however that ends (Linux). The exec keeps the
# request; where there is none, the lock that the command inherits keeps a second sweep out.
_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL
    "if os.getppid() != int(sys.argv[1]): sys.exit(137)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Describes where the commands of a sweep run.

    Attributes:
      name: "" starts them on this machine, one after the other; else a script of launch/: tpu, gke, slurm or local.
      settings: settings file of the script.
      ttft_settings: settings file for timing, of a machine with as many chips as one user gets; "" leaves timing out.
    """

    name: str = ""
    settings: str = ""
    ttft_settings: str = ""

    def command(self, task: Task) -> list[str]:
        """Returns the command line of a task."""
        if not self.name:
            return [sys.executable, "-m", "fastvlm_jax", *task.arguments]
        script = ["bash", f"launch/{self.name}.sh", "--settings"]
        if task.kind == "train":
            return [*script, self.settings, *task.arguments[1:]]
        words = task.arguments[: 2 if task.kind == "ttft" else 1]
        flags, output = task.arguments[len(words) : -1], task.arguments[-1].removeprefix("--output=")
        settings = self.ttft_settings if task.kind == "ttft" else self.settings
        return [*script, settings, f"--command={' '.join(words)}", f"--workdir={output}", *flags]

    def runs(self, task: Task) -> bool:
        """Returns whether this launcher has a place for a task."""
        return not self.name or task.kind != "ttft" or bool(self.ttft_settings)


def check(launcher: Launcher, place: str) -> None:
    """Raises ValueError or FileNotFoundError unless the script, its settings and the folder of the runs fit."""
    if not launcher.name:
        if "://" in place:
            raise ValueError(
                f"--remote {place} needs --launcher, whose machines see the bucket: tpu, gke, slurm or local"
            )
        return
    script = pathlib.Path("launch", f"{launcher.name}.sh")
    if not script.is_file():
        raise FileNotFoundError(f"there is no {script} here: run fastvlm sweep in the root folder of the repository")
    if not launcher.settings:
        raise ValueError(
            f"--launcher {launcher.name} needs --settings FILE: copy launch/settings/{launcher.name}.env and fill it in"
        )
    for file in filter(None, (launcher.settings, launcher.ttft_settings)):
        if not pathlib.Path(file).is_file():
            raise FileNotFoundError(f"there is no settings file {file}")
    if "://" in place:
        epath.Path(place).exists()  # says now, and not after the first run, that it cannot be read
    if launcher.name in ("tpu", "gke") and not place.startswith("gs://"):
        raise ValueError(
            f"--launcher {launcher.name} needs --remote gs://BUCKET/DIR: the machines of a slice lose their own disks"
        )


def ending_with_this(command: list[str], pid: int) -> list[str]:
    """Returns a command that is killed when this process, `pid`, ends, so that a killed sweep leaves nothing behind."""
    return [sys.executable, "-ESc", _WITH_PARENT, str(pid), *command]
