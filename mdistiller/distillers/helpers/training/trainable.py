"""What a method trains: its parameters in the main stage, and in a stage before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.distillers.helpers.features.output import Output
from mdistiller.distillers.helpers.training.init_stage import InitPlan


class Trainable(nn.Module):
    """The part of a Distiller about parameters: which are trained, and in which stage.

    Class attributes:
        init: plan of a stage of training before the main one (:meth:`init_stages`), if any.
        init_stage: name of that stage while it runs.
    """

    student: nn.Module
    teacher: nn.Module | None
    init: InitPlan | None = None
    init_stage: str = ""

    def extra_parameters(self) -> list[nn.Parameter]:
        """Parameters that the method adds to the two networks, without frozen ones."""
        networks = {id(p) for p in self.student.parameters()}
        if self.teacher is not None:
            networks |= {id(p) for p in self.teacher.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in networks]

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The student's parameters, then the method's own, each in registration order."""
        return [*self.student.parameters(), *self.extra_parameters()]

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups; override to give parts their own `lr` or `weight_decay`.

        Classes written for the original library list their modules in `get_learnable_parameters`
        as well: a parameter that is listed twice counts once.
        """
        learnable = {id(p): p for p in self.get_learnable_parameters()}
        return [{"params": list(learnable.values())}]

    def extra_groups(self) -> list[dict[str, Any]]:
        """The parameter groups without the networks' parameters; empty ones are left out."""
        extra = {id(p) for p in self.extra_parameters()}
        groups = (
            {**group, "params": [p for p in group["params"] if id(p) in extra]}
            for group in self.param_groups()
        )
        return [group for group in groups if group["params"]]

    def get_extra_parameters(self) -> int:
        """Number of values the method adds to the student while training (0 at test time)."""
        return sum(p.numel() for p in self.extra_parameters())

    def init_stages(self) -> dict[str, Any]:
        """Stages to train before the main one, in order: name -> the method that runs it."""
        return {"init": self} if self.init is not None and self.init.epochs else {}

    def init_modules(self) -> list[nn.Module]:
        """Modules that the initialisation stage trains; all others stay in eval mode."""
        raise TypeError(f"{type(self).__name__} must override init_modules()")

    def init_param_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups of the initialisation stage."""
        return [{"params": [p for module in self.init_modules() for p in module.parameters()]}]

    def init_loss(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        """Loss of the initialisation stage, a scalar; same arguments as :meth:`distill`."""
        raise TypeError(f"{type(self).__name__} must override init_loss(...) or forward_init(...)")
