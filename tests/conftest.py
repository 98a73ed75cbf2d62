"""Eight fake CPU devices for every test, set before jax is imported; the `--full` option."""

import pathlib

import environment  # noqa: F401  sets the environment of jax
import pytest
from paths import TESTS
from tokenizer_files import json_file, llama_file, sentencepiece_file  # noqa: F401  fixtures of all tests

# What is compared with PyTorch; the quickstart ends with such a comparison.
TORCH = ("import torch", "from torch", "import transformers", "import timm", "quickstart.sh")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests of full-size models")
    parser.addoption("--no-torch", action="store_true", help="leave out the test files that need PyTorch")


def needs_torch(path: pathlib.Path) -> bool:
    return path.name.startswith("test_") and any(word in path.read_text() for word in TORCH)


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--no-torch") and collection_path.suffix == ".py" and needs_torch(collection_path):
        return True


def pytest_report_header(config):
    if config.getoption("--no-torch"):
        left_out = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py") if needs_torch(path))
        return ["NOT TESTED without torch: " + ", ".join(left_out)]


LONGEST = ("test_quickstart.py", "test_train.py")  # first, so that two workers end together


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if config.getoption("--full"):
        return
    for item in items:
        if "full" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="full-size model: run with --full"))


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory):
    """The real easy-VQA as shards."""
    from fastvlm_jax.data.sets.easy_vqa import write_easy_vqa

    folder = tmp_path_factory.mktemp("easy_vqa")
    write_easy_vqa(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of a few words, and bytes."""
    from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["user what is it assistant red green blue one two three"], folder / "tokenizer.model", 300)
    return load_tokenizer(folder)
