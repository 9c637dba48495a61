"""Methods combined by name: `DISTILLER.TYPE: "KD+AT"`."""

from __future__ import annotations

from typing import Any, ClassVar

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
    soft_labels = all(cls.soft_labels for cls in methods.values())
    return type("Composed", (Composed,), {"methods": methods, "soft_labels": soft_labels})


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

    methods: ClassVar[dict[str, type[Distiller]]] = {}

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, cfg: Any, parts: dict[str, Distiller]
    ):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.DISTILLER.CE_WEIGHT
        self.teacher_in_eval_mode = all(part.teacher_in_eval_mode for part in parts.values())
        self.own_state = tuple(
            f"parts.{name}.{prefix}" for name, part in parts.items() for prefix in part.own_state
        )
        for part in parts.values():
            # The networks are registered once, here; the parts only refer to them.
            for role in ("student", "teacher"):
                object.__setattr__(part, role, part._modules.pop(role))
        self.parts = nn.ModuleDict(parts)

    @classmethod
    def build(
        cls, student: nn.Module, teacher: nn.Module | None, cfg: Any, *args: Any, **facts: Any
    ) -> Distiller:
        parts = {
            name: method.build(student, teacher, cfg, *args, **facts)
            for name, method in cls.methods.items()
        }
        return cls(student, teacher, cfg, parts)

    def train(self, mode: bool = True) -> Composed:
        super().train(mode)
        assert self.teacher is not None
        self.teacher.train(mode and not self.teacher_in_eval_mode)  # one part may differ
        return self

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        terms: dict[str, Tensor] = {}
        self.metrics = {}
        for name, part in self.parts.items():
            assert isinstance(part, Distiller)
            terms[name] = part.distill(student, teacher, target, **batch)
            self.metrics |= part.metrics
        self.metrics |= {f"loss_{name}": term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()
