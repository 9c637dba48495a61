"""Data sets and their loaders, over images in memory or read by worker processes.

To add a data set, write a file in `sources/`, or a file anywhere and list it under IMPORTS; see
:class:`DataSource`.
"""

import importlib

from mdistiller.dataset.build import Data, TestData, get_dataset, load_data, load_test_loader
from mdistiller.dataset.classes import are_numbers, first_difference, natural_key
from mdistiller.dataset.data_source import DATASET_CONFIG, DATASETS, DataSource, ImageSet, Options
from mdistiller.dataset.memory.augment import AUGMENTS, Crop, CropFlip, Identity, RotateFlip
from mdistiller.dataset.settings import (
    DataSpec,
    data_spec,
    eval_preprocessing,
    lacks_test,
    mixes_labels,
)

for _name in ("sources", "files.resized_crop"):  # they fill registries
    importlib.import_module(f"{__name__}.{_name}")

__all__ = [
    "AUGMENTS",
    "DATASETS",
    "DATASET_CONFIG",
    "Crop",
    "CropFlip",
    "Data",
    "DataSource",
    "DataSpec",
    "Identity",
    "ImageSet",
    "Options",
    "RotateFlip",
    "TestData",
    "are_numbers",
    "data_spec",
    "eval_preprocessing",
    "first_difference",
    "get_dataset",
    "lacks_test",
    "load_data",
    "load_test_loader",
    "mixes_labels",
    "natural_key",
]
