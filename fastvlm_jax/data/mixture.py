"""Names the folders of the data sets that a config trains on, and how often each is drawn."""

import os

import ml_collections
import numpy as np
from etils import epath


def data_sets(config: ml_collections.ConfigDict) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns the folders of `data.path` or `data.mixture`, and their weights; () = each record once an epoch.

    Raises:
      ValueError: no data set is named, the mixture does not consist of (folder, weight) pairs, or some of its weights
        are negative, or 0 beside positive ones.
    """
    if config.path:
        return (config.path,), ()
    try:
        folders = tuple(os.fspath(epath.Path(config.root) / folder) for folder, _ in config.mixture)
        weights = tuple(float(weight) for _, weight in config.mixture)
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.mixture must be pairs as (('captions', 0.3), ('questions', 0.7)): {error}") from error
    if not folders:
        raise ValueError("data.path is empty: name the folder of shards with --config.data.path=DIR")
    if min(weights) < 0 or (any(weights) and not all(weights)) or not np.isfinite(weights).all():
        raise ValueError(f"data.mixture: weights {weights} must all be positive, or all 0 (each record once an epoch)")
    return folders, weights if any(weights) else ()
