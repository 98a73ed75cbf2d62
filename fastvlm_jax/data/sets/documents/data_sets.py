"""Reads tables of real numbers: the data sets inside scikit-learn (BSD) and vega_datasets (MIT), without a network.

A data set belongs to one split, with all its columns.
"""

import csv
import functools
import importlib.util
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

INSTALL = "pip install 'fastvlm_jax[documents]'"
# Split -> its data sets; "vega/cars:Name" labels each row by the column Name. Vega's copy of iris is left out.
SPLITS = {
    "train": (
        "sklearn/breast_cancer",
        "sklearn/diabetes",
        "sklearn/linnerud",
        "vega/airports.csv:iata",
        "vega/barley.json:site",
        "vega/cars.json:Name",
        "vega/seattle-weather.csv:date",
        "vega/sf-temps.csv:date",
        "vega/stocks.csv:date",
        "vega/us-employment.csv:month",
    ),
    "validation": ("sklearn/wine", "vega/anscombe.json:", "vega/driving.json:side", "vega/wheat.json:year"),
    "test": (
        "sklearn/iris",
        "vega/burtin.json:Bacteria",
        "vega/crimea.json:date",
        "vega/iowa-electricity.csv:source",
        "vega/ohlc.json:date",
        "vega/seattle-temps.csv:date",
    ),
}


class DataSet(NamedTuple):
    """Holds a table of real numbers, all as they are printed.

    Attributes:
      name: where it comes from, as "vega/cars".
      label: name of the column of labels; "" if it has none.
      labels: label of each row; () without.
      columns: name of a column -> its numbers, one a row.
    """

    name: str
    label: str
    labels: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


@functools.cache
def read_data_sets(split: str) -> tuple[DataSet, ...]:
    """Returns the data sets of a split of SPLITS; reads no network.

    Raises:
      ValueError: a package is missing.
    """
    return tuple(_sklearn(spec) if spec.startswith("sklearn/") else _vega(spec) for spec in SPLITS[split])


def printed(number: float) -> str:
    """Returns a number as a page shows it: a whole one as it is, another one with at most 4 significant digits.

    17.99 -> "17.99"   0.26540 -> "0.2654"   135450.0 -> "135450"   -4.89396 -> "-4.894"   1326.53 -> "1327"
    """
    if abs(number) >= 1000 or number == int(number):
        return str(round(number))
    return np.format_float_positional(number, precision=4, fractional=False, trim="-")


def _sklearn(spec: str) -> DataSet:
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(f"the package scikit-learn is missing: {INSTALL}")
    from sklearn import datasets

    name = spec.removeprefix("sklearn/")
    loaded = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    columns = zip(loaded.feature_names, np.asarray(loaded.data, np.float64).T, strict=True)
    return DataSet(spec, "", (), {_title(key): tuple(map(printed, column.tolist())) for key, column in columns})


def _vega(spec: str) -> DataSet:
    package = importlib.util.find_spec("vega_datasets")  # importing it would load pandas
    if package is None:
        raise ValueError(f"the package vega-datasets is missing: {INSTALL}")
    file, _, label = spec.partition(":")
    path = pathlib.Path(package.origin).parent / "_data" / file.removeprefix("vega/")
    text = path.read_text(encoding="utf-8")
    read = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    rows = [row for row in read if all(row.get(key) is not None for key in read[0])]
    numbers = {key: [_number(row[key]) for row in rows] for key in rows[0] if key != label}
    columns = {_title(key): tuple(map(printed, own)) for key, own in numbers.items() if None not in own}
    labels = tuple(str(row[label]) for row in rows) if label else ()
    if not all(text.isascii() for text in labels):
        raise ValueError(f"{path} has labels beyond ASCII")
    return DataSet(file.rpartition(".")[0], label, labels, columns)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _title(key: str) -> str:
    """Returns the name of a column as a page shows it: "petal width (cm)" -> "petal width"."""
    return key.replace("_", " ").partition(" (")[0]
