"""Holds the published benchmarks, a file a family: how its files are read, asked and scored."""

import difflib
from collections.abc import Mapping, Sequence

from etils import epath

from fastvlm_jax.evaluate.benchmark import Benchmark
from fastvlm_jax.evaluate.benchmarks import (
    ai2d,
    chartqa,
    clip_benchmark,
    cvbench,
    documents,
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
    documents,
    clip_benchmark,
    qa,
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for family in FAMILIES for benchmark in family.BENCHMARKS}


def known(names: Sequence[str], benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> list[Benchmark]:
    """Returns the benchmarks of these names, each once; raises ValueError for a name that there is not."""
    for name in names:
        if name not in benchmarks:
            near = difflib.get_close_matches(name, ["all", *benchmarks], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"there is no benchmark {name!r}{meant}; fastvlm evaluate --list names them")
    return [benchmarks[name] for name in dict.fromkeys(names)]


def family_of(benchmark: Benchmark) -> tuple[Benchmark, ...]:
    """Returns the benchmarks of the same family, which may share their files; () for one that is in no family here."""
    return next((own.BENCHMARKS for own in FAMILIES if benchmark.name in [b.name for b in own.BENCHMARKS]), ())


def folder_of(benchmark: Benchmark, root: epath.Path, single: bool) -> epath.Path:
    """Returns the folder of a benchmark's files: ROOT/NAME, that of its family's first, or for a single one ROOT."""
    for name in (benchmark.name, *(other.name for other in family_of(benchmark)[:1])):
        if (root / name).is_dir():
            return root / name
    return root if single else root / benchmark.name
