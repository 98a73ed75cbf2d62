"""Options, order and shared fixtures of the tests. Every test has eight fake CPU devices, see environment.py."""

import functools

import environment  # noqa: F401  sets the environment of jax
import pytest
from paths import TESTS
from tokenizer_files import json_file, llama_file, sentencepiece_file  # noqa: F401  fixtures of all tests

# A test file with one of these words compares with PyTorch.
TORCH = ("import torch", "from torch", "import transformers", "import timm", "quickstart.sh")
# --quick leaves these files and folders out: they start many processes, or compile and compare many models.
SLOW = (
    "parity", "test_quickstart.py", "test_processes.py", "test_train.py", "test_train_pairs.py", "test_train_step.py",
    "test_pair_step.py", "test_clip_parts.py", "test_preflight.py", "test_resume.py", "test_metrics.py",
    "test_faults.py", "test_strange_files.py", "sweep", "test_gpu.py", "test_xla_flags.py", "test_in_training.py",
    "test_evaluation.py", "test_step.py", "test_step_transformers.py", "test_ttft.py", "test_adapter.py",
    "test_contrastive.py", "test_gguf.py", "test_reinforce.py", "test_lora_run.py", "test_finetune.py",
)  # fmt: skip
# The longest files come first, so that two workers end together.
LONGEST = (
    "test_quickstart.py", "test_processes.py", "test_faults.py", "test_train_step.py", "test_train.py",
    "test_fastvit.py", "test_layouts.py", "test_baselines.py", "test_preflight.py", "test_decoders.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests of full-size models")
    parser.addoption("--quick", action="store_true", help="leave out the slow test files; under 5 minutes")
    parser.addoption("--no-torch", action="store_true", help="leave out the test files that need PyTorch")


@functools.cache
def left_out(config) -> dict[str, list[str]]:
    """Returns option -> the test files that it leaves out, of the options that are given."""
    files = sorted(TESTS.rglob("test_*.py"))
    torch = [path for path in files if any(word in path.read_text() for word in TORCH)]
    slow = [path for path in files if {*path.relative_to(TESTS).parts} & {*SLOW}]
    return {
        option: [str(path.relative_to(TESTS)) for path in paths]
        for option, paths in (("--quick", slow), ("--no-torch", torch))
        if config.getoption(option)
    }


def pytest_ignore_collect(collection_path, config):
    names = [name for names in left_out(config).values() for name in names]
    if names and collection_path.is_relative_to(TESTS) and str(collection_path.relative_to(TESTS)) in names:
        return True


def pytest_report_header(config):
    return [f"NOT TESTED with {option}: {', '.join(names)}" for option, names in left_out(config).items()]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="full-size model: run with --full"))


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory):
    """Writes the real easy-VQA as shards and returns their folder."""
    from fastvlm_jax.data.sets.easy_vqa import write_easy_vqa

    folder = tmp_path_factory.mktemp("easy_vqa")
    write_easy_vqa(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Trains a tokenizer of a few words, with bytes for the rest."""
    from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["user what is it assistant red green blue one two three"], folder / "tokenizer.model", 300)
    return load_tokenizer(folder)
