"""Turns the points of a sweep into tasks, each one command of `fastvlm` with a folder; equal stages are one task.

Two points share a stage if its config has the same values and it starts from the same parent:

    point a   stage 1 (256 px) ── stage 2 at 512 px ─── evaluate ─ time        runs/stage1-...-5d1a   (both)
    point b        the same    ── stage 2 at 1024 px ── evaluate ─ time        runs/stage2-...-91bc, -07fe
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from fastvlm_jax import config as config_lib
from fastvlm_jax import config_checks, optim
from fastvlm_jax.changes import is_free
from fastvlm_jax.evaluate.benchmarks import known
from fastvlm_jax.files import json_digest
from fastvlm_jax.images.sizes import slots_of
from fastvlm_jax.models import fastvlm, flops, kinds
from fastvlm_jax.preflight import topology
from fastvlm_jax.preflight.estimate import parameters
from fastvlm_jax.sweep import fit
from fastvlm_jax.sweep.grid import Point, Stage

DIGITS = 10  # hexadecimal digits of an identity in the name of a run's folder


@dataclasses.dataclass(frozen=True)
class Task:
    """Describes one command.

    Attributes:
      name: unique name, as "train-stage1_align-fastvithd-0.5b-256-5d1a02c3f4".
      kind: "train", "evaluate" or "ttft".
      arguments: the command line behind `fastvlm`.
      output: folder (ttft: file) that it writes, relative to the sweep's.
      record: file that says that it is finished, relative to the sweep's folder.
      identity: digest of what its result depends on.
      points: names of the points that need it.
      needs: names of the tasks whose results it uses.
      pace: tasks of the same pace take time in proportion to their work.
      work: FLOPs; of a training run a step's, times the steps or epochs.
      config: config of a training run, else that of the run that made the model.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    output: str
    record: str
    identity: str
    points: tuple[str, ...]
    needs: tuple[str, ...]
    pace: str
    work: float
    config: ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class PlannedPoint:
    """Holds a point with the names of its tasks and what is known before anything runs.

    Attributes:
      runs: its training tasks, in order.
      tasks: all its tasks, in order.
      identity: identity of its last run, the model.
      image_tokens: tokens of an image, overview and all tiles included.
      parameters: number of parameters of "vision", "projector" and "llm".
    """

    point: Point
    runs: tuple[str, ...]
    tasks: tuple[str, ...]
    identity: str
    image_tokens: int
    parameters: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the tasks of a sweep in the order in which they run: training and scoring by point, then all timing.

    Attributes:
      missing: names of weights that are used but not given.
    """

    sweep: ml_collections.ConfigDict
    tasks: tuple[Task, ...]
    points: tuple[PlannedPoint, ...]
    missing: tuple[str, ...]


def make_plan(sweep: ml_collections.ConfigDict, place: str) -> Plan:
    """Returns the plan of a sweep.

    Args:
      sweep: as grid.sweep_config.
      place: folder, local or gs://, that gets runs/ and points/.

    Raises:
      ValueError, FileNotFoundError: the config has no points; names of points are not unique or no names of folders; a
        stage's config cannot be read or contradicts itself; an image size is refused by its encoder; a group has no
        room for an image; there is no such benchmark, or it has no such protocol. The message names the point or the
        benchmark.
    """
    if "points" not in sweep:
        raise ValueError(
            "--config holds no points of a sweep: give a grid, as configs/resolution_scaling.py:paper-fig1"
        )
    _check_names([point.name for point in sweep.points])
    if not sweep.benchmarks:
        raise ValueError("the sweep has no benchmarks to score its points on: set --config.benchmarks=\"('docvqa',)\"")
    for benchmark in known(sweep.benchmarks):
        benchmark.protocol(sweep.protocol or None)
    tasks: dict[str, Task] = {}
    points, missing = [], {}
    for point in sweep.points:
        try:
            points.append(_add_point(sweep, point, place, tasks, missing))
        except (ValueError, OSError) as error:
            raise ValueError(f"point {point.name}: {error}") from error
    order = sorted(tasks.values(), key=lambda task: task.kind == "ttft")
    return Plan(sweep, tuple(order), tuple(points), tuple(missing))


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("the sweep has no points")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"point {name!r}: a name has letters, digits and . _ - only, and is that of a folder")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two points have the name {twice[0]}: give each its own")


def _add_point(sweep, point: Point, place: str, tasks: dict[str, Task], missing: dict[str, None]) -> PlannedPoint:
    """Adds the tasks of a point to `tasks`, and the weights that it lacks to `missing`."""
    if not point.stages:
        raise ValueError("it has no stages")
    runs: list[Task] = []
    for stage in point.stages:
        task = _train(sweep, point, stage, runs[-1] if runs else None, place, missing)
        if task.name in tasks:
            task = _shared(tasks[task.name], task, point)
        tasks[task.name] = task
        runs.append(task)
    last = runs[-1]
    data = last.config.data
    grids = tuple(map(tuple, data.grids))
    if (data.image_size, grids) != (point.image_size, tuple(map(tuple, point.grids))):
        raise ValueError(
            f"image_size={point.image_size} and grids={point.grids} are not those of its last stage, "
            f"data.image_size={data.image_size} and data.grids={data.grids}"
        )
    model = kinds.build(**last.config.model.to_dict())
    slots = max(map(slots_of, grids), default=1)
    counts = parameters(_shapes(last.config), last.config.groups)
    own = [_evaluate(sweep, point, last, model, place)] + [_time(sweep, point, last, model, place)] * bool(sweep.ttft)
    tasks |= {task.name: task for task in own}
    return PlannedPoint(
        point, tuple(task.name for task in runs), tuple(task.name for task in (*runs, *own)), last.identity,
        slots * model.tokens_per_image(point.image_size),
        {part: counts[part] for part in ("vision", "projector", "llm")},
    )  # fmt: skip


def _train(sweep, point: Point, stage: Stage, parent: Task | None, place: str, missing: dict[str, None]) -> Task:
    overrides = {**stage.overrides, **dict(sweep.overrides)}
    if sweep.data_root:
        overrides["data.root"] = sweep.data_root
    if parent is not None:
        overrides["parent"] = os.path.join(place, parent.output)
    elif "parent" in overrides:
        overrides["parent"] = _filled(overrides["parent"], sweep.weights, missing)
    settings = [f"--config={stage.config}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    config = read_config(settings)
    check_config(config)
    if sweep.fit and (fitting := fit.candidates(config, slices := topology.parse(sweep.fit))):
        own = fit.as_given(config, slices, fitting)
        chosen = {key: value for key, value in fitting[0].settings.items() if key not in fit.GROUPING}
        settings += [f"--config.{key}={value}" for key, value in chosen.items()] if fitting[0] is not own else []
        config = read_config(settings)
    identity = json_digest([_results_of(config), parent.identity if parent else _names(config.parent)])
    folder = f"{config.stage or 'run'}-{point.encoder}-{point.llm}-{config.data.image_size}-{identity[:DIGITS]}"
    folder = f"runs/{re.sub(r'[^A-Za-z0-9._-]', '_', folder)}"
    return Task(
        f"train-{folder.removeprefix('runs/')}", "train",
        ("train", settings[0], f"--workdir={os.path.join(place, folder)}", *settings[1:]),
        folder, f"{folder}/finished.json", identity, (point.name,), (parent.name,) if parent else (),
        f"train {config.stage}", _step_flops(config) * (config.steps or config.epochs), config,
    )  # fmt: skip


def read_config(settings: Sequence[str]) -> ml_collections.ConfigDict:
    """Returns the config that `fastvlm train` reads from these flags, --config first.

    Raises:
      ValueError: the file cannot be read, or has no key that is set; the message names it.
    """
    fv, argv = flags.FlagValues(), ["fastvlm", *settings]
    file = settings[0].removeprefix("--config=")
    config_flags.DEFINE_config_file("config", None, "", flag_values=fv, sys_argv=argv)
    try:
        fv(argv)
        return fv.config
    except (AttributeError, KeyError, TypeError, flags.Error, OSError, ValueError) as error:
        lines = str(error).strip("'\" \n").splitlines() or [type(error).__name__]
        # The flag library quotes the whole traceback of an error in a config file.
        text = re.sub(r"^\w*Error: ", "", lines[-1]) if "Traceback" in str(error) else lines[0]
        raise ValueError(f"{file}: {text}") from error


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the key, if a stage's settings contradict each other or an image finds no room."""
    config_checks.validate(config)
    model, data = kinds.build(**config.model.to_dict()), config.data
    try:
        tokens = model.tokens_per_image(data.image_size)
    except ValueError as error:
        raise ValueError(f"data.image_size={data.image_size}: {error}") from error
    slots = max(map(slots_of, data.grids), default=1)
    what = f"an image of {data.image_size} px" + (f" with data.grids={data.grids}" if data.grids else "")
    if 0 < data.images_per_group < slots:
        raise ValueError(f"{what} takes {slots} slots, and data.images_per_group={data.images_per_group}: raise it")
    if data.images_per_group and slots * tokens >= data.row_length:
        raise ValueError(f"{what} has {slots * tokens} tokens, and data.row_length={data.row_length}: raise it")


def _filled(parent: str, weights: Mapping[str, str], missing: dict[str, None]) -> str:
    """Returns a parent with the weights in the place of their names in braces; notes those that are not given."""

    def value(match: re.Match) -> str:
        name = match[1]
        if name not in weights:
            raise ValueError(f"the sweep has no weights {name!r}: it has {', '.join(weights) or 'none'}")
        if not weights[name]:
            missing[name] = None
        return weights[name] or match[0]

    return re.sub(r"{(\w+)}", value, parent)


def _results_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the values of a config that its results depend on: no paths of this machine, no evaluation, no layout."""
    flat: dict[str, Any] = {}

    def add(prefix: str, tree: Mapping[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif not is_free(prefix + key) and prefix + key not in ("parent", "data.tokenizer"):
                flat[prefix + key] = value

    add("", config_lib.plain(config))
    return flat | {key: _names(config.data[key]) for key in ("path", "tokenizer")}


def _names(path: str) -> list[str]:
    """Returns the last part of each path in a source of weights or data: machines may keep them elsewhere."""
    return [part.rstrip("/").rpartition("/")[2] for part in path.split(",")]


def _shared(first: Task, second: Task, point: Point) -> Task:
    """Returns a run with one more point that needs it.

    Raises:
      ValueError: the two points differ in what the run's identity leaves out, as the folder of a parent.
    """
    if found := config_lib.differences(config_lib.plain(first.config), config_lib.plain(second.config)):
        key, there, here = found[0]
        raise ValueError(
            f"it shares the run {first.output} with {first.points[0]}, but {key} is {here!r} here and {there!r} there: "
            "give both the same, or name them differently"
        )
    return dataclasses.replace(first, points=(*first.points, point.name))


def _step_flops(config: ml_collections.ConfigDict) -> float:
    model, data = kinds.build(**config.model.to_dict()), config.data
    trainable = optim.split(_shapes(config), config.groups)[0].keys()
    images, rows, side = data.groups * data.images_per_group, data.groups * data.rows_per_group, data.image_size
    return sum(flops.train_flops(model, trainable, images, side, side, rows, data.row_length).values())


def _shapes(config: ml_collections.ConfigDict) -> Any:
    """Returns the parameters of a config's model as ShapeDtypeStructs."""
    return _shapes_of(json.dumps(config_lib.plain(config.model)))


@functools.cache
def _shapes_of(model: str) -> Any:
    return kinds.abstract_variables(fastvlm.build(**json.loads(model)))["params"]


def _evaluate(sweep, point: Point, run: Task, model, place: str) -> Task:
    output = f"points/{point.name}/evaluation"
    asked = [f"--benchmark={','.join(sweep.benchmarks)}", *sweep.evaluate_flags]
    asked += [f"--limit={sweep.limit}"] * bool(sweep.limit) + [f"--protocol={sweep.protocol}"] * bool(sweep.protocol)
    return Task(
        f"evaluate-{point.name}", "evaluate",
        ("evaluate", f"--model={os.path.join(place, run.output)}", *asked, f"--data={sweep.benchmark_data}",
         f"--output={os.path.join(place, output)}"),
        output, f"{output}/finished.json", json_digest([run.identity, asked, _names(sweep.benchmark_data)]),
        (point.name,), (run.name,), "evaluate", _forward_flops(point, model), run.config,
    )  # fmt: skip


def _time(sweep, point: Point, run: Task, model, place: str) -> Task:
    output = f"points/{point.name}/ttft.json"
    grid = max(point.grids, key=slots_of, default=None)  # of several, the one with most tiles
    size = str(point.image_size) + (f":{grid[0]}x{grid[1]}" if grid else "")
    asked = [f"--image_size={size}", *sweep.ttft_flags]
    return Task(
        f"ttft-{point.name}", "ttft",
        ("bench", "ttft", f"--model={os.path.join(place, run.output)}", *asked,
         f"--output={os.path.join(place, output)}"),
        output, f"points/{point.name}/timed.json", json_digest([run.identity, asked]),
        (point.name,), (run.name,), "ttft", _forward_flops(point, model), run.config,
    )  # fmt: skip


def _forward_flops(point: Point, model) -> float:
    slots, side = max(map(slots_of, point.grids), default=1), point.image_size
    length = slots * model.tokens_per_image(side) + 64  # a short question
    return sum(flops.forward_flops(model, slots, side, side, 1, length).values())
