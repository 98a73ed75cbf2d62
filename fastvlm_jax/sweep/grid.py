"""Describes a sweep as data: points, each the chain of stages that makes its model, and how all are scored and timed.

A config file of `fastvlm sweep` returns `sweep_config(...)`; configs/resolution_scaling.py is the example.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections


@dataclasses.dataclass(frozen=True)
class Stage:
    """Describes one stage of a point, as `fastvlm train` takes it.

    Attributes:
      config: config file and its argument, as "configs/stage2_instruct.py:0.5b/665k".
      overrides: values of other keys of that config, as {"data.image_size": 512}. The parent of a point's first stage
        may name weights of the sweep in braces: {"parent": "vision={fastvithd},llm={qwen2_0_5b}"}; every later stage
        starts from the one before it.
    """

    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Point:
    """Describes one model of the grid.

    Attributes:
      name: its name, which is also the name of its folder: letters, digits and . _ - only.
      encoder: name of the encoder in tables and figures; those of models/sizes.py are written out there.
      llm: name of the language model, likewise.
      image_size: side of the square that the encoder sees, pixels; of a tile with AnyRes.
      stages: the chain of stages; the last one trains at `image_size` and `grids`.
      grids: AnyRes grids, as (rows, columns); () = one view an image.
    """

    name: str
    encoder: str
    llm: str
    image_size: int
    stages: tuple[Stage, ...]
    grids: tuple[tuple[int, int], ...] = ()


def sweep_config(
    setup: str, title: str, points: Sequence[Point], benchmarks: Sequence[str], weights: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """Returns the config of a sweep, whose keys a command line may override.

    Args:
      weights: names that parents of first stages use in braces.
    """
    c = ml_collections.ConfigDict()
    c.setup = setup  # name of the grid
    c.title = title  # what it shows, in a line
    c.points = tuple(points)
    c.benchmarks = tuple(benchmarks)  # what every point is scored on, as `fastvlm evaluate --benchmark` names it
    c.benchmark_data = "data"  # folder with the files of the benchmarks, as `fastvlm evaluate --data`
    c.limit = 0  # questions to ask of each benchmark; 0 = all
    c.protocol = ""  # how they are asked, as `fastvlm evaluate --protocol`; "" = each benchmark's first
    c.evaluate_flags = ()  # further flags of `fastvlm evaluate`, as ("--dtype=bfloat16",)
    c.ttft = True  # whether every point is timed by `fastvlm bench ttft`
    c.ttft_flags = ()  # further flags of `fastvlm bench ttft`, as ("--prompt_tokens=64",)
    c.weights = ml_collections.ConfigDict({name: "" for name in weights})  # name -> model that `--config.parent` takes
    c.overrides = ()  # values for every stage of every point, as (("steps", 20), ("data.num_threads", 8))
    c.data_root = ""  # data.root of every stage; "" leaves each its own
    # TPU slice, as "v5e:4x4", for which every run gets the fastest mesh, accumulate and remat that fit by arithmetic;
    # "" leaves each its own.
    c.fit = ""
    c.paper_figure = ""  # figure of the FastVLM paper whose points these are: "1a", "4" or "6"
    return c
