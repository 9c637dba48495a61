"""Methods combined by name: `DISTILLER.TYPE: "KD+AT"`."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.training.checks import loss_of
from mdistiller.registry import UserError


def get_distiller(name: str) -> type[Distiller]:
    """The class of a DISTILLER.TYPE: a registered method, or several joined by "+".

    Raises:
        UserError: a name is unknown, or a method cannot be combined.
    """
    if "+" not in name or name in DISTILLERS:
        method: type[Distiller] = DISTILLERS[name]
        if not (isinstance(method, type) and issubclass(method, Distiller)):
            raise UserError(
                f"DISTILLER.TYPE {name}: {getattr(method, '__name__', type(method).__name__)} does "
                "not derive from mdistiller.distillers.Distiller: let it"
            )
        return method
    methods = {part: DISTILLERS[part] for part in part_names(name)}
    if len(methods) < len(part_names(name)):
        raise UserError(f"DISTILLER.TYPE {name} names a method twice")
    for part, cls in methods.items():
        reason = why_alone(cls)
        if reason:
            raise UserError(f"DISTILLER.TYPE {name}: {part} cannot be combined, since {reason}")
    facts = {
        "methods": methods,
        "takes_standardized_logits": any(c.takes_standardized_logits for c in methods.values()),
        "soft_labels": all(c.soft_labels for c in methods.values()),
        "needs_teacher_classifier": any(c.needs_teacher_classifier for c in methods.values()),
        "needs_labels": any(c.needs_labels for c in methods.values()),
        "teacher_logits_only": all(c.cacheable_outputs() == ("logits",) for c in methods.values()),
    }
    return type("Composed", (Composed,), facts)


def part_names(name: str) -> list[str]:
    """Names of the methods that a DISTILLER.TYPE adds up."""
    return [part.strip() for part in name.split("+")]


def why_alone(cls: type[Distiller]) -> str:
    """Why a method cannot be a part of a sum, or "" if it can."""
    if not cls.uses_teacher:
        return "it has no teacher"
    if cls.forward_train is not Distiller.forward_train:
        return "it has a training step of its own"
    if cls.forward_test is not Distiller.forward_test:
        return "it predicts with more than the student"
    return cls.alone


class Composed(Distiller):
    """One forward of each network, one cross-entropy, and the sum of several methods' losses.

    Each part reads its own config node for everything but the cross-entropy, which has the weight
    DISTILLER.CE_WEIGHT. Standardised logits go to the parts that take them. What the parts add to
    the networks is under `parts.NAME`.
    """

    methods: ClassVar[dict[str, type[Distiller]]] = {}

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, cfg: Any, parts: dict[str, Distiller]
    ):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.DISTILLER.CE_WEIGHT
        self.adopt(parts)
        for name, part in parts.items():
            if part.ce_loss_weight == 0 or part.label_smoothing:
                raise UserError(
                    f"DISTILLER.TYPE {'+'.join(parts)}: the settings of {name} ask for a "
                    f"cross-entropy of weight {part.ce_loss_weight:g} and label smoothing "
                    f"{part.label_smoothing:g}, but a sum has one plain cross-entropy of weight "
                    "DISTILLER.CE_WEIGHT; change them"
                )
        if not self.teacher_in_eval_mode:
            wants = [name for name, part in parts.items() if not part.teacher_in_eval_mode]
            warnings.warn(
                f"{', '.join(wants)} runs the teacher in train mode: the other parts of "
                f"{'+'.join(parts)} get outputs by batch statistics as well",
                stacklevel=2,
            )

    def adopt(self, parts: dict[str, Distiller]) -> None:
        """Register the parts. The networks are registered once, here; the parts refer to them."""
        self.distills = any(part.distills for part in parts.values())
        self.teacher_in_eval_mode = all(part.teacher_in_eval_mode for part in parts.values())
        self.own_state = tuple(
            f"parts.{name}.{prefix}" for name, part in parts.items() for prefix in part.own_state
        )
        for part in parts.values():
            for role in ("student", "teacher"):
                object.__setattr__(part, role, part._modules.pop(role))
        self.parts = nn.ModuleDict(parts)

    @classmethod
    def cacheable_outputs(cls) -> tuple[str, ...]:
        parts = [method.cacheable_outputs() for method in cls.methods.values()]
        return tuple(sorted(set().union(*parts))) if all(parts) else ()

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
        # one part may differ from the others in this
        self.teacher.train(mode and not self.teacher_in_eval_mode and not self.init_stage)
        return self

    def init_stages(self) -> dict[str, Distiller]:
        """Those of the parts, one after the other."""
        return {
            f"{stage}-{name}": owner
            for name, part in self.parts.items()
            for stage, owner in part.init_stages().items()  # type: ignore[operator]
        }

    def param_groups(self) -> list[dict[str, Any]]:
        """One group for everything, but for what a part gives settings of its own."""
        common, special = list(self.student.parameters()), []
        for part in self.parts.values():
            for group in part.extra_groups():  # type: ignore[operator]
                if group.keys() == {"params"}:
                    common += group["params"]
                else:
                    special.append(group)
        return [{"params": common}, *special]

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        terms: dict[str, Tensor] = {}
        self.metrics = {}
        for name, part in self.parts.items():
            assert isinstance(part, Distiller)
            if not part.distills:
                continue
            outputs = part.standardized(student), part.standardized(teacher)
            terms[name] = loss_of(part, part.distill(*outputs, target, **batch)).mean()
            self.metrics |= part.metrics
        self.metrics |= {f"loss_{name}": term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()
