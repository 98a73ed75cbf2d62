"""Holds the published benchmarks, a file a family: how its files are read, asked and scored."""

from fastvlm_jax.evaluate.benchmark import Benchmark
from fastvlm_jax.evaluate.benchmarks import (
    ai2d,
    chartqa,
    cvbench,
    docvqa,
    easy_vqa,
    gqa,
    llava_w,
    mathvista,
    mm_vet,
    mmbench,
    mme,
    mmmu,
    ocrbench,
    pope,
    qa,
    realworldqa,
    scienceqa,
    seedbench,
    textvqa,
    vqav2,
)

FAMILIES = (
    gqa,
    scienceqa,
    textvqa,
    pope,
    vqav2,
    docvqa,
    chartqa,
    ocrbench,
    ai2d,
    mmmu,
    seedbench,
    mathvista,
    cvbench,
    mmbench,
    realworldqa,
    mme,
    llava_w,
    mm_vet,
    easy_vqa,
    qa,
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for family in FAMILIES for benchmark in family.BENCHMARKS}
