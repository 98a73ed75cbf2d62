"""Looks for what would stop a sweep, before anything of it runs: weights, data, files of benchmarks."""

from fastvlm_jax import stage
from fastvlm_jax.data.load.from_config import open_sources
from fastvlm_jax.evaluate import suite
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.sweep.plan import Plan


def check(plan: Plan, here: bool) -> None:
    """Reads what the first stages start from, and opens every data set and benchmark.

    Args:
      here: whether the runs see the folders of this machine; else only what the plan itself tells is checked.

    Raises:
      ValueError, FileNotFoundError: something is missing or does not fit; the message names the point.
    """
    if plan.missing:
        flags = " ".join(f"--config.weights.{name}=DIR" for name in plan.missing)
        raise ValueError(f"the sweep starts from weights that are not given: add {flags}")
    if not here:
        return
    for task in plan.tasks:
        if task.kind == "train":
            try:
                open_sources(task.config.data, "train")
                if not task.needs:
                    stage.open_stage(task.config)
            except (ValueError, OSError) as error:
                raise ValueError(f"point {task.points[0]}, {task.config.stage}: {error}") from error
    sweep = plan.sweep
    suite.choose(
        sweep.benchmarks, sweep.benchmark_data, BENCHMARKS, protocol=sweep.protocol or None, limit=sweep.limit or None,
        told=lambda line: None,
    )  # fmt: skip
