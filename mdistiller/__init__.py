"""mdistiller: knowledge distillation for vision models, driven by configs.

The names in `_API` are imported when they are first used, so that `import mdistiller` is quick
(docs/extend/python.md).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "train": "api",
    "evaluate": "api",
    "load": "api",
    "Run": "api",
    "Distiller": "distillers",
    "Hook": "engine.hooks",
    "HOOKS": "engine.hooks",
    "OPTIMIZERS": "engine.optim",
    "SCHEDULES": "engine.optim.schedules",
    "AUGMENTS": "dataset",
    "DATASETS": "dataset",
    "BaseTrainer": "engine.trainer",
    "trainer_dict": "engine.trainer",
    "DISTILLERS": "distillers",
}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'mdistiller' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mdistiller.{_API[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
