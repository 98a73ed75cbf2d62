"""Holds the published benchmarks, a file a family: how its files are read, asked and scored."""

from fastvlm_jax.evaluate.benchmark import Benchmark
from fastvlm_jax.evaluate.benchmarks import (
    chartqa,
    docvqa,
    easy_vqa,
    gqa,
    llava_w,
    mm_vet,
    mme,
    ocrbench,
    pope,
    qa,
    realworldqa,
    textvqa,
    vqav2,
)

FAMILIES = (
    gqa,
    textvqa,
    pope,
    vqav2,
    docvqa,
    chartqa,
    ocrbench,
    realworldqa,
    mme,
    llava_w,
    mm_vet,
    easy_vqa,
    qa,
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for family in FAMILIES for benchmark in family.BENCHMARKS}
