"""Reads the results of a sweep, SWEEP_DIR/results.json, for its page: points with accuracy and time to first token.

Figures come from files that other machines may have written, so each is checked, and named if it is wrong.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm_jax.data.inspect.text import visible
from fastvlm_jax.evaluate.paper import AVG_5, NAMES
from fastvlm_jax.files import read_object

RESULTS, PLAN = "results.json", "sweep.json"
STATES = ("done", "failed", "pending")
FIGURES = ("1a", "4", "6")  # of the paper, that a sweep can repeat
# What has to be the same in all times of a sweep, so that they stand on one axis.
SAME = ("measured", "device", "topology", "dtype", "batch", "prompt_tokens")
_KEYS = {name: key for key, name in NAMES.items()}
_LONGEST = 80  # characters of a name
_MOST = 1e13  # larger numbers are no measurement, and no axis holds them


@dataclasses.dataclass(frozen=True)
class Score:
    """Holds the score of a benchmark in percent, its standard error, its questions, and that of a blind model."""

    value: float
    standard_error: float | None
    n: int
    blind: float | None


@dataclasses.dataclass(frozen=True)
class Times:
    """Holds what `fastvlm bench ttft` found for a point: seconds, medians over runs.

    Attributes:
      paper: encoder and prefill of the image tokens alone, as the paper counts.
      user: from the image file to the first token, as a user waits.
      parts: time of each part by name.
      setting: what SAME names.
    """

    paper: float | None
    user: float | None
    parts: Mapping[str, float]
    setting: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Point:
    """Describes a point of a sweep; texts are printable, and what was not measured is None.

    Attributes:
      name: name of the point.
      encoder, llm: names for people.
      key: (encoder, llm) as models.sizes names them; as the sweep does if they are not there.
      image_size: side of the square that the encoder sees, pixels; of a tile if there is a grid.
      grid: (rows, columns) of tiles, None for one whole image.
      image_tokens: tokens that the language model reads of an image.
      vision_parameters: parameters of the encoder.
      state: one of STATES.
      error: why it failed.
      scores: Score by benchmark.
      mean, mean_standard_error: over the benchmarks, percent.
      times: its times.
      train_seconds: time that its stages were trained for.
    """

    name: str
    encoder: str
    llm: str
    key: tuple[str, str]
    image_size: int
    grid: tuple[int, int] | None
    image_tokens: int
    vision_parameters: int
    state: str
    error: str
    scores: Mapping[str, Score]
    mean: float | None
    mean_standard_error: float | None
    times: Times | None
    train_seconds: float | None

    @property
    def size(self) -> str:
        """Returns the size in words: "512" or, with tiles, "512 (2x2)"."""
        return str(self.image_size) + (f" ({self.grid[0]}x{self.grid[1]})" if self.grid else "")

    @property
    def blind(self) -> float | None:
        """Returns the mean of the blind scores, percent; None unless every benchmark has one."""
        blind = [score.blind for score in self.scores.values()]
        return None if not blind or None in blind else math.fsum(blind) / len(blind)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Holds the results of a sweep.

    Attributes:
      title: its title.
      benchmarks: names of its benchmarks.
      points: its points, in the order of the plan.
      paper_figure: figure of the paper that it repeats, one of FIGURES or None.
      machine: where it ran.
    """

    title: str
    benchmarks: Sequence[str]
    points: Sequence[Point]
    paper_figure: str | None
    machine: str

    @property
    def setting(self) -> Mapping[str, Any]:
        """Returns the setting of the times, the same for all points; empty if nothing was timed."""
        return next((point.times.setting for point in self.points if point.times), {})

    @property
    def kind(self) -> str:
        """Returns what the times are: "measured", "ESTIMATED" or, without any, "not measured"."""
        if not self.setting:
            return "not measured"
        return "measured" if self.setting["measured"] else "ESTIMATED"

    @property
    def clock(self) -> str:
        """Returns where the times come from: "measured on cpu", or "ESTIMATED by the TPU compiler for v5e:1x1"."""
        if self.kind != "ESTIMATED":
            return f"measured on {self.setting['device']}" if self.setting else self.kind
        return f"ESTIMATED by the TPU compiler for {self.setting['topology'] or self.setting['device']}"

    @property
    def accuracy(self) -> str:
        """Returns what the accuracies are: "Avg-5", the name of the benchmark, or "mean of 3 benchmarks"."""
        if set(self.benchmarks) == set(AVG_5):
            return "Avg-5"
        return self.benchmarks[0] if len(self.benchmarks) == 1 else f"mean of {len(self.benchmarks)} benchmarks"


def is_sweep(folder: pathlib.Path) -> bool:
    """Returns whether a folder is that of a sweep."""
    return (folder / RESULTS).exists() or (folder / PLAN).exists()


def read_sweep(folder: pathlib.Path) -> Sweep:
    """Reads the results of a sweep.

    Raises:
      ValueError: there are none yet; a figure is missing or wrong; or times of several machines, or measured and
        estimated ones, are mixed.
    """
    path = folder / RESULTS
    if not path.exists():
        raise ValueError(
            f"{folder} holds the plan of a sweep and no {RESULTS} yet: run `fastvlm sweep` with this --workdir first"
        )
    reader = _Reader(str(path), read_object(path))
    points = [_point(each) for each in reader.objects("points")]
    names = [point.name for point in points]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise reader.wrong("points", f"names the point {twice!r} twice")
    sweep = Sweep(
        title=reader.text("title") or reader.text("setup") or visible(folder.resolve().name),
        benchmarks=reader.texts("benchmarks"),
        points=points,
        paper_figure=reader.choice("paper_figure", (None, *FIGURES)),
        machine=_machine(reader.optional_object("machine")),
    )
    _check_one_clock(path, points)
    return sweep


def _check_one_clock(path: pathlib.Path, points: Sequence[Point]) -> None:
    """Raises ValueError if the times of two points cannot stand on one axis."""
    timed = [point for point in points if point.times]
    for point in timed[1:]:
        for key in SAME:
            first, other = timed[0].times.setting[key], point.times.setting[key]
            if first != other:
                raise ValueError(
                    f"{path}: times that cannot be compared: {key} is {first!r} for {timed[0].name} and {other!r} for "
                    f"{point.name}; time all points in one way"
                )


def _point(reader: "_Reader") -> Point:
    scores = {
        name: _score(each)
        for name, each in reader.named_objects("accuracy").items()
        if each.content.get("value") is not None
    }
    encoder, llm = reader.text("encoder"), reader.text("llm")
    parameters = reader.optional_object("parameters")
    times = reader.optional_object("ttft")
    mean_standard_error = reader.optional_number("mean_standard_error")
    if mean_standard_error is not None and mean_standard_error < 0:
        raise reader.wrong("mean_standard_error", f"is {mean_standard_error} and negative")
    return Point(
        name=reader.text("name"),
        encoder=NAMES.get(encoder, encoder),
        llm=NAMES.get(llm, llm),
        key=(_KEYS.get(encoder, encoder), _KEYS.get(llm, llm)),
        image_size=int(reader.number("image_size", above=0)),
        grid=reader.grid("grid"),
        image_tokens=int(reader.number("image_tokens", above=0)),
        vision_parameters=int(parameters.optional_number("vision") or 0) if parameters else 0,
        state=reader.choice("state", STATES),
        error=reader.text("error", longest=400),
        scores=scores,
        mean=reader.optional_number("mean"),
        mean_standard_error=mean_standard_error,
        times=_times(times) if times else None,
        train_seconds=reader.optional_number("train_seconds"),
    )


def _machine(reader: "_Reader | None") -> str:
    """Returns the machine in words: "Some CPU, 2 cores, Linux"; "" if nothing is known."""
    if reader is None:
        return ""
    cores = reader.optional_number("cores")
    told = (reader.text("processor"), f"{cores:g} cores" if cores else "", reader.text("system"))
    return ", ".join(text for text in told if text)


def _score(reader: "_Reader") -> Score:
    error, blind = map(reader.optional_number, ("standard_error", "blind"))
    return Score(reader.number("value"), error, int(reader.number("n")), blind)


def _times(reader: "_Reader") -> Times:
    setting = {key: reader.content.get(key) for key in SAME}
    if not isinstance(setting["measured"], bool):
        raise reader.wrong("measured", "has to be true or false: nobody can tell a measured time from an estimate")
    setting |= {key: reader.text(key) for key in ("device", "topology", "dtype")}
    parts = {name: each.number("median") for name, each in reader.named_objects("parts").items()}
    paper, user = (reader.optional_number(key, above=0) for key in ("paper_ttft", "user_ttft"))
    return Times(paper, user, parts, setting)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the values of a JSON object; what is missing or of another type is named by its place in the file."""

    place: str
    content: Mapping[str, Any]

    def wrong(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.place}: {key} {what}; run `fastvlm sweep` again, which writes the file anew")

    def text(self, key: str, longest: int = _LONGEST) -> str:
        """Returns a text in one printable line, cut after `longest` characters; "" if there is none."""
        value = self.content.get(key) or ""
        if not isinstance(value, str):
            raise self.wrong(key, f"is {value!r:.40} and no text")
        return visible(value if len(value) <= longest else f"{value[:longest]}...")

    def texts(self, key: str) -> list[str]:
        values = self.content.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "is no list of texts")
        return [visible(value[:_LONGEST]) for value in values]

    def optional_number(self, key: str, above: float = -math.inf) -> float | None:
        value = self.content.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST < value < _MOST:
            raise self.wrong(key, f"is {value!r:.40} and no plausible number")
        if value <= above:
            raise self.wrong(key, f"is {value!r:.40} and not above {above}")
        return float(value)

    def number(self, key: str, above: float = -math.inf) -> float:
        value = self.optional_number(key, above)
        if value is None:
            raise self.wrong(key, "is missing")
        return value

    def choice(self, key: str, known: Sequence[str | None]) -> Any:
        value = self.content.get(key)
        if value not in known:
            raise self.wrong(key, f"is {value!r:.40} and not one of {', '.join(map(str, known))}")
        return value

    def grid(self, key: str) -> tuple[int, int] | None:
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
            raise self.wrong(key, f"is {value!r:.40} and not [rows, columns]")
        return value[0], value[1]

    def optional_object(self, key: str) -> "_Reader | None":
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "is no JSON object")
        return _Reader(f"{self.place}: {visible(key[:_LONGEST])}", value)

    def named_objects(self, key: str) -> dict[str, "_Reader"]:
        own = self.optional_object(key)
        found = {name: own.optional_object(name) for name in own.content} if own else {}
        return {visible(name[:_LONGEST]): each for name, each in found.items() if each}

    def objects(self, key: str) -> list["_Reader"]:
        values = self.content.get(key)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.wrong(key, "is no list of points")
        return [
            _Reader(f"{self.place}: point {str(value.get('name', i))[:_LONGEST]!r}", value)
            for i, value in enumerate(values)
        ]
