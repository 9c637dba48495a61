"""Data sets and the loaders that feed them: from memory, or through worker processes.

Importing this package imports every module in it whose name has no leading underscore, so a new
data set is one new file (see :class:`DataSource` for what to write in it).
"""

import importlib
import pkgutil

from mdistiller.dataset._base import DATASET_CONFIG, DATASETS, DataSource, ImageSet, Options
from mdistiller.dataset._build import (
    Data,
    KnownData,
    TestData,
    get_dataset,
    known_data,
    load_data,
    load_test_loader,
    mixes_labels,
    own_view,
)
from mdistiller.dataset._classes import are_numbers, first_difference, natural_key

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DATASETS",
    "DATASET_CONFIG",
    "Data",
    "DataSource",
    "ImageSet",
    "KnownData",
    "Options",
    "TestData",
    "are_numbers",
    "first_difference",
    "get_dataset",
    "known_data",
    "load_data",
    "load_test_loader",
    "mixes_labels",
    "natural_key",
    "own_view",
]
