"""Reads real English: paragraphs of the documentation in the sources of Python's standard library and scikit-learn.

A module belongs to one split. Authors copy sentences from module to module: a paragraph that shares a run of words with
a module of the test split is left out of the others, and one of validation out of training.
"""

import ast
import functools
import importlib.util
import itertools
import pathlib
import re
import sysconfig
from collections.abc import Iterator

from fastvlm_jax.data.sets.documents.data_sets import INSTALL
from fastvlm_jax.data.sets.documents.fonts import ASCII

SPLITS = {  # the order in which a shared run of words is given away
    "test": (
        "calendar", "contextlib", "fractions", "ftplib", "graphlib", "sched", "socketserver", "typing", "wsgiref",
        "xmlrpc", "sklearn.cluster", "sklearn.compose", "sklearn.decomposition", "sklearn.feature_extraction",
        "sklearn.manifold",
    ),
    "validation": ("enum", "heapq", "imaplib", "statistics", "sklearn.covariance", "sklearn.mixture"),
    "train": (
        "argparse", "asyncio", "codecs", "collections", "configparser", "difflib", "doctest", "email", "http",
        "inspect", "ipaddress", "json", "logging", "optparse", "os", "pdb", "pickletools", "random",
        "shutil", "smtplib", "ssl", "subprocess", "tarfile", "textwrap", "threading",
        "traceback", "unittest", "urllib", "sklearn.ensemble", "sklearn.feature_selection", "sklearn.impute",
        "sklearn.linear_model", "sklearn.metrics", "sklearn.model_selection", "sklearn.preprocessing",
        "sklearn.svm", "sklearn.tree",
    ),
}  # fmt: skip
RUN = 6  # words in a row that two splits must not share
_FEWEST = 12  # words of a paragraph
_MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*]")  # of reStructuredText: ``x``, :class:`X`, *x*
_NO_PROSE = re.compile(r">>>|::|\.\. |--|==|\|| {3}|^\W|http|https|\w\w:\w", re.MULTILINE)


@functools.cache
def read_texts(split: str) -> dict[str, tuple[str, ...]]:
    """Returns module -> its paragraphs of printable ASCII, each in one line; of a split of SPLITS.

    Raises:
      ValueError: scikit-learn or the source of a module is missing.
    """
    found: dict[str, tuple[str, ...]] = {}
    taken: set[tuple[str, ...]] = set()
    for earlier in itertools.takewhile(lambda other: other != split, SPLITS):
        taken |= {run for own in read_texts(earlier).values() for paragraph in own for run in runs(paragraph)}
    for module in SPLITS[split]:
        own = dict.fromkeys(p for path in _files(module) for p in _paragraphs(path) if taken.isdisjoint(runs(p)))
        if not own:
            raise ValueError(f"the source of {module} is missing: use a Python that brings the sources of its library")
        found[module] = tuple(own)
    return found


def runs(text: str) -> set[tuple[str, ...]]:
    """Returns all RUN words that follow each other in a text, in lower case."""
    words = text.lower().split()
    return set(zip(*(words[i:] for i in range(RUN)), strict=False))


def _files(module: str) -> list[pathlib.Path]:
    """Returns the sources of a module, or of the modules right inside a package; nothing is imported but scikit-learn's
    name."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    if module.startswith("sklearn."):
        package = importlib.util.find_spec("sklearn")
        if package is None:
            raise ValueError(f"the package scikit-learn is missing: {INSTALL}")
        folder, module = pathlib.Path(package.origin).parent, module.removeprefix("sklearn.")
    return [folder / f"{module}.py"] if (folder / f"{module}.py").is_file() else sorted((folder / module).glob("*.py"))


def _paragraphs(path: pathlib.Path) -> Iterator[str]:
    for text in _docstrings(ast.parse(path.read_bytes())):
        for paragraph in re.split(r"\n\s*\n", text):
            words = _MARKUP.sub("", paragraph).split()
            if len(words) >= _FEWEST and not _NO_PROSE.search(paragraph) and ASCII.issuperset("".join(words)):
                yield " ".join(words)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yields the docstring of a module, a class or a function, and those of the classes and functions inside it."""
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)
