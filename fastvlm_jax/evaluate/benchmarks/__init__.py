"""Holds the published benchmarks, a file a family: how its files are read, asked and scored."""

from fastvlm_jax.evaluate.benchmark import Benchmark
from fastvlm_jax.evaluate.benchmarks import chartqa, docvqa, easy_vqa, mme, ocrbench, qa, realworldqa

FAMILIES = (
    docvqa,
    chartqa,
    ocrbench,
    realworldqa,
    mme,
    easy_vqa,
    qa,
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for family in FAMILIES for benchmark in family.BENCHMARKS}
