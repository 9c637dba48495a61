"""Distillation methods, one a file; `distiller_dict` maps DISTILLER.TYPE to the class.

Every module of this folder whose name has no leading underscore is imported. A new method is one
new file here, or one file anywhere that a config names in IMPORTS. Method authors import what they
need from this package; `helpers` holds it by subject, and no method.
"""

import importlib
import pkgutil
from types import ModuleType

from mdistiller.distillers._base import DISTILLERS, Distiller, Vanilla
from mdistiller.distillers._compose import get_distiller, part_names, why_alone
from mdistiller.distillers._teachers import TeacherEnsemble, TeacherTeam, check_several, several
from mdistiller.distillers.helpers.features.connectors import ConvReg, pool_to
from mdistiller.distillers.helpers.features.heads import classify, linear_head
from mdistiller.distillers.helpers.features.output import Losses, Output
from mdistiller.distillers.helpers.features.shapes import preserve_state, probe
from mdistiller.distillers.helpers.features.stages import match_size, paired_stages
from mdistiller.distillers.helpers.losses.numerics import (
    cross_entropy,
    full_precision,
    scale_logits,
)
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.init_stage import INIT, InitPlan, stage_modules
from mdistiller.distillers.helpers.training.settings import (
    require_one_of,
    require_positive,
    resolve_setting,
    warmup_factor,
)
from mdistiller.distillers.helpers.training.teacher_facts import TeacherFact

__all__ = [
    "DISTILLERS",
    "INIT",
    "ConvReg",
    "Distiller",
    "InitPlan",
    "Losses",
    "Output",
    "TeacherEnsemble",
    "TeacherFact",
    "TeacherTeam",
    "Vanilla",
    "check_several",
    "classify",
    "cross_entropy",
    "distiller_dict",
    "full_precision",
    "gather_batch",
    "get_distiller",
    "linear_head",
    "match_size",
    "paired_stages",
    "part_names",
    "pool_to",
    "preserve_state",
    "probe",
    "register_module",
    "require_one_of",
    "require_positive",
    "resolve_setting",
    "scale_logits",
    "several",
    "stage_modules",
    "warmup_factor",
    "why_alone",
]

distiller_dict = DISTILLERS


def register_module(module: ModuleType) -> None:
    """Register the Distiller subclasses of a module that registers none itself, by class name.

    Such classes come from files written for the original library, where a table elsewhere listed
    them. A class attribute `config` gives the defaults of their node; without it the node takes
    any key.
    """
    classes = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Distiller)
        and item.__module__ == module.__name__
    ]
    if not any(cls in DISTILLERS.values() for cls in classes):
        for cls in classes:
            DISTILLERS.add(cls.__name__, cls, config=vars(cls).get("config"))


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        register_module(importlib.import_module(f"{__name__}.{_module.name}"))

# `mdistiller.distillers.KD` is the class; `from mdistiller.distillers.KD import kd_loss` still
# reaches the module, which the import system looks up elsewhere.
globals().update({cls.__name__: cls for cls in DISTILLERS.values()})
