"""The textbook forms of losses, which are kept with the tests, for the benchmark."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers import Distiller, Output
from mdistiller.distillers.helpers.training.settings import warmup_factor
from mdistiller.engine.cfg import Config
from mdistiller.registry import UserError
from mdistiller.runtime import project_root

Distill = Callable[..., Tensor]


def kept_with_tests(name: str) -> Any:
    """A module of textbook forms; they are in a checkout, not in the package."""
    folder = project_root() / "tests" / "distillers"
    if not (folder / f"{name}.py").is_file():
        raise UserError(
            f"the textbook forms are with the tests, and {folder} is not there: run "
            "tools/benchmark.py from a checkout of the repository"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def textbook_loss(cfg: Config, distiller: Distiller, classes: Tensor) -> Distill | None:
    """The method's weighted loss in the textbook's form; None where there is none.

    Args:
        classes: of all training images.
    """
    name = cfg.DISTILLER.TYPE
    standardized = cfg.LSKD.ENABLE or cfg.EXPERIMENT.LOGIT_STAND
    if cfg.get(name, {}).get("DIVERGENCE", "kl") != "kl":
        return None
    if name == "KD" and not standardized:
        return _kd(cfg.KD)
    if name == "DKD" and cfg.DKD.MODE == "dkd" and not standardized:
        return _dkd(cfg.DKD)
    if name == "CRD" and cfg.CRD.MODE == "exact":
        return _crd(cfg.CRD, distiller, classes.cpu())
    return None


def _kd(node: Any) -> Distill:
    form = kept_with_tests("textbook").kd

    def kd(student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        loss: Tensor = form(student.logits, teacher.logits, node.TEMPERATURE)
        return node.LOSS.KD_WEIGHT * loss

    return kd


def _dkd(node: Any) -> Distill:
    form, weights = kept_with_tests("textbook").dkd, (node.ALPHA, node.BETA)

    def dkd(student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        loss: Tensor = form(student.logits, teacher.logits, target, *weights, node.T)
        return warmup_factor(batch["epoch"], node.WARMUP) * loss

    return dkd


def _crd(node: Any, distiller: Any, classes: Tensor) -> Distill:
    """With the distiller's embeddings, from its bank as it is now."""
    forms, nce = kept_with_tests("textbook"), node.NCE
    bank = distiller.contrast
    step = forms.CRDStep(
        len(classes),
        node.FEAT.DIM,
        nce.K,
        nce.TEMPERATURE,
        nce.MOMENTUM,
        forms.rivals_by_class(classes.numpy()),
    ).to(bank.memory_v1.device)
    step.load_state_dict({"memory_s": bank.memory_v1, "memory_t": bank.memory_v2})

    def crd(student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        embedded = (
            F.normalize(embed.linear(output["pooled_feat"].flatten(1)))
            for embed, output in ((distiller.embed_s, student), (distiller.embed_t, teacher))
        )
        loss: Tensor = step(*embedded, batch["index"].cpu(), classes)
        return node.LOSS.FEAT_WEIGHT * loss

    return crd
