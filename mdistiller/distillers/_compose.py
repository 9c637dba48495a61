"""Methods combined by name: `DISTILLER.TYPE: "KD+AT"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.registry import UserError


def get_distiller(name: str) -> type[Distiller]:
    """The class of a DISTILLER.TYPE: a registered method, or several joined by "+".

    Raises:
        UserError: a name is unknown, or a method cannot be combined.
    """
    if "+" not in name or name in DISTILLERS:
        method: type[Distiller] = DISTILLERS[name]
        return method
    methods = {part.strip(): DISTILLERS[part.strip()] for part in name.split("+")}
    if len(methods) < len(name.split("+")):
        raise UserError(f"DISTILLER.TYPE {name} names a method twice")
    for part, cls in methods.items():
        reason = why_alone(cls)
        if reason:
            raise UserError(f"DISTILLER.TYPE {name}: {part} cannot be combined, since {reason}")
    return type("Composed", (Composed,), {"methods": methods})


def why_alone(cls: type[Distiller]) -> str:
    """Why a method cannot be a part of a sum, or "" if it can."""
    if not cls.uses_teacher:
        return "it has no teacher"
    if cls.forward_train is not Distiller.forward_train:
        return "it has a training step of its own"
    if cls.forward_test is not Distiller.forward_test:
        return "it predicts with more than the student"
    return ""


class Composed(Distiller):
    """One forward of each network, one cross-entropy, and the sum of several methods' losses.

    Each part reads its own config node for everything but the cross-entropy, which has the weight
    DISTILLER.CE_WEIGHT. What the parts add to the networks is under `parts.NAME`.
    """

    methods: dict[str, type[Distiller]] = {}

    def __init__(
        self, student: nn.Module, teacher: nn.Module, cfg: Any, parts: dict[str, Distiller]
    ):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.DISTILLER.CE_WEIGHT
        for part in parts.values():
            # The networks are registered once, here; the parts only refer to them.
            for role in ("student", "teacher"):
                object.__setattr__(part, role, part._modules.pop(role))
        self.parts = nn.ModuleDict(parts)

    @classmethod
    def build(
        cls, student: nn.Module, teacher: nn.Module | None, cfg: Any, **data: Any
    ) -> Distiller:
        assert teacher is not None
        parts = {
            name: method.build(student, teacher, cfg, **data)
            for name, method in cls.methods.items()
        }
        return cls(student, teacher, cfg, parts)

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        for part in self.parts.values():  # a part may want the teacher in another mode
            part.train(mode)
        return self

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        terms = {}
        self.metrics = {}
        for name, part in self.parts.items():
            terms[name] = part.distill(student, teacher, target, **batch)  # type: ignore[operator]
            self.metrics |= part.metrics  # type: ignore[operator]
        self.metrics |= {f"loss_{name}": term.detach().mean() for name, term in terms.items()}
        return torch.stack([term.mean() for term in terms.values()]).sum()
