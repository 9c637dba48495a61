"""Distillation methods. Every module here whose name has no leading underscore is imported.

`distiller_dict` maps DISTILLER.TYPE to the class. A new method is one new file in this folder, or
one file anywhere that a config names in IMPORTS.
"""

import importlib
import pkgutil

from mdistiller.distillers._base import DISTILLERS, Distiller, Output, Vanilla, adopt
from mdistiller.distillers._compose import get_distiller

distiller_dict = DISTILLERS

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        adopt(importlib.import_module(f"{__name__}.{_module.name}"))

# `mdistiller.distillers.KD` is the class; `from mdistiller.distillers.KD import kd_loss` still
# reaches the module, which the import system looks up elsewhere.
globals().update({cls.__name__: cls for cls in DISTILLERS.values()})

__all__ = [
    "DISTILLERS",
    "Distiller",
    "Output",
    "Vanilla",
    "adopt",
    "distiller_dict",
    "get_distiller",
]
