"""What `fastvlm evaluate --list` prints."""

from etils import epath

from fastvlm_jax.evaluate.benchmark import Benchmark, Protocol
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.listing import details, listing
from fastvlm_jax.evaluate.paper import PAPER, most_trained

PROTOCOL = Protocol("paper", "lmms-eval 0.2.2", lambda row: (), None, 1024, "a judge compares the answers")
BENCHMARK = Benchmark(
    name="cvbench-3d",
    title="CV-Bench, 3D",
    read=lambda folder: [],
    protocols=(PROTOCOL,),
    metric="accuracy, %",
    size=1200,
    files=(
        "test_3d.parquet",
        "test_3d.jsonl and img/ with the images, of the same repository, " + "or both of them " * 3,
    ),
    source="the hub's nyu-visionx/CV-Bench",
    in_domain=True,
    refused={"llava": "LLaVA has no script for it"},
)


def test_one_benchmark_in_full():
    assert details(BENCHMARK) == (
        "cvbench-3d        CV-Bench, 3D | 1,200 rows | accuracy, % | in-domain *\n"
        "  protocols       paper (lmms-eval 0.2.2)\n"
        "  files           test_3d.parquet\n"
        "  or              test_3d.jsonl and img/ with the images, of the same repository, or both of them or\n"
        "                  both of them or both of them\n"
        "  from            the hub's nyu-visionx/CV-Bench\n"
        "  paper           Qwen2-7B 80.9 (15+11.9)\n"
        "\n"
        "protocol paper\n"
        "  rules of        lmms-eval 0.2.2\n"
        "  rule            a judge compares the answers\n"
        "  answer          at most 1,024 tokens, greedy\n"
        "\n"
        "no protocol llava\n"
        "  because         LLaVA has no script for it\n"
        "\n"
        "figures of the paper, by millions of samples of pretraining + instruction tuning\n"
        "   79.3  15+11.9       Qwen2-7B, FastViTHD, 768 px               tables 11, 12\n"
        "   69.6  15+6.5        Qwen2-7B, FastViTHD, 1024 px              tables 6, 11, 12\n"
        "   80.9  15+11.9       Qwen2-7B, FastViTHD, 1024 px              tables 11, 12"
    )


def test_all_benchmarks_fit_a_terminal():
    text = listing(BENCHMARKS.values())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line[:1].isalnum() and not line.startswith("paper:")]
    assert names == list(BENCHMARKS)
    assert all("\n" not in file for benchmark in BENCHMARKS.values() for file in benchmark.files)
    assert all(max(map(len, details(benchmark).splitlines())) <= 100 for benchmark in BENCHMARKS.values())


def test_every_figure_of_the_paper_has_its_benchmark():
    names = {name for row in PAPER for name in row.figures}
    assert names <= set(BENCHMARKS)
    printed = {name for row in PAPER for name in row.figures if row.data != "card"}
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.paper} == printed


def test_the_paper_is_quoted_by_its_models_of_most_data():
    assert [(row.llm, row.data) for row in most_trained("llava-w")] == [
        ("0.5b", "15+12.5"), ("1.5b", "15+12.5"), ("7b", "15+12.5"),
    ]  # fmt: skip
    assert most_trained("easy-vqa") == []


def test_reading_nothing_names_the_files_of_each_layout(tmp_path):
    """An empty folder is refused by every benchmark in one line, as the listing tells the files."""
    for benchmark in BENCHMARKS.values():
        try:
            benchmark.read(epath.Path(tmp_path))
        except (FileNotFoundError, ValueError) as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), (benchmark.name, str(error))
        else:
            raise AssertionError(benchmark.name)
