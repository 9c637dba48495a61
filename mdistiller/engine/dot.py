"""DOT. Zhao et al.: DOT: A Distillation-Oriented Trainer, ICCV 2023, arXiv 2307.08436.

The gradients of task loss and distillation loss have separate momentum buffers, with coefficients
mu - Delta for the task and mu + Delta for distillation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from mdistiller.distributed import average_gradients, unwrap
from mdistiller.engine.optim import decay_groups
from mdistiller.engine.optim.param_groups import student_groups
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import UserError


class KeptGradients(Optimizer):
    """An optimizer that gets the gradients of several losses separately.

    The gradients of all losses but the task's are stored by the loss's name before the step.

    Args:
        terms: names of the losses other than the task's.
    """

    def __init__(self, params: Iterable[Any], settings: dict[str, Any], terms: Iterable[str]):
        super().__init__(params, settings)
        self.kept: dict[str, dict[int, Tensor]] = {term: {} for term in terms}

    def keep(self, term: str) -> None:
        """Store the present gradients as those of a loss, without a step."""
        self.kept[term] = {
            id(param): param.grad
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        }

    def swap_gradients(self, term: str) -> None:
        """Swap `.grad` with the stored gradients of a loss; a backward pass then adds to them."""
        kept = self.kept[term]
        self.keep(term)
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = kept.get(id(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the weights by the task gradients in `.grad` and the stored ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept = self.forget()
        for group in self.param_groups:
            for param in group["params"]:
                self.move(
                    param, [param.grad, *(part.get(id(param)) for part in kept.values())], group
                )
        return loss

    def move(self, param: Tensor, gradients: list[Tensor | None], group: Any) -> None:
        """Update a weight by the gradients of the task and of `terms`, those that it has."""
        raise NotImplementedError

    def forget(self) -> dict[str, dict[int, Tensor]]:
        """Drop the stored gradients; returns them by term and id of the parameter."""
        kept, self.kept = self.kept, {term: {} for term in self.kept}
        return kept


class DistillationOrientedTrainer(KeptGradients):
    """SGD with separate momentum for two losses.

    One step: backward of the distillation loss, :meth:`step_kd`, `zero_grad()`, backward of the
    task loss, :meth:`step`. A parameter that only one of the losses reaches uses the mean of the
    two momenta. Weight decay acts once: with the task gradient, or, for parameters of the
    distillation loss alone, with its gradient from the second step on (as published).

    Args:
        momentum, momentum_kd: coefficients for task and distillation gradients.
        dampening: for both.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        momentum_kd: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
    ):
        settings = {
            "lr": lr,
            "momentum": momentum,
            "momentum_kd": momentum_kd,
            "dampening": dampening,
            "weight_decay": weight_decay,
        }
        for name in ("lr", "momentum", "momentum_kd", "weight_decay"):
            if settings[name] < 0:
                raise ValueError(f"{name} must not be negative, got {settings[name]}")
        super().__init__(params, settings, ["loss_kd"])

    def step_kd(self) -> None:
        """Store the present gradients as those of the distillation loss, without a step."""
        self.keep("loss_kd")

    def move(self, param: Tensor, gradients: list[Tensor | None], group: Any) -> None:
        task, distillation = gradients
        if task is not None:
            self._move_by_task(param, task, group, shared=distillation is not None)
        if distillation is not None:
            self._move_by_kd(param, distillation, group, shared=task is not None)

    def _move_by_task(self, param: Tensor, gradient: Tensor, group: Any, shared: bool) -> None:
        gradient = gradient.add(param, alpha=group["weight_decay"])
        if group["momentum"]:
            momentum = group["momentum"] if shared else self._mean_momentum(group)
            gradient = self._buffer(param, "momentum_buffer", gradient, momentum, group)
        param.sub_(gradient, alpha=group["lr"])

    def _move_by_kd(self, param: Tensor, gradient: Tensor, group: Any, shared: bool) -> None:
        if not shared and "momentum_kd_buffer" in self.state[param]:
            gradient = gradient.add(param, alpha=group["weight_decay"])
        momentum = group["momentum_kd"] if shared else self._mean_momentum(group)
        buffer = self._buffer(param, "momentum_kd_buffer", gradient, momentum, group)
        param.sub_(buffer, alpha=group["lr"])

    def _buffer(
        self, param: Tensor, name: str, gradient: Tensor, momentum: float, group: Any
    ) -> Tensor:
        """The updated momentum buffer; it starts as the first gradient, without dampening."""
        state = self.state[param]
        if name not in state:
            state[name] = gradient.clone()
        else:
            state[name].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        return state[name]

    @staticmethod
    def _mean_momentum(group: Any) -> float:
        return (group["momentum"] + group["momentum_kd"]) / 2


@trainer_dict.register("crd_dot")
@trainer_dict.register("dot")
class DOTTrainer(BaseTrainer):
    """Trains `loss_ce` as the task and `loss_kd` as distillation under DOT; SOLVER.TYPE SGD only.

    A subclass whose optimizer keeps other terms (`KeptGradients.kept`) trains those.

    Each micro-batch has one forward and a backward for each term, which DistributedDataParallel
    does not allow: with several processes the gradients are averaged here, once a step.
    """

    def __init__(self, experiment_name: str, distiller: Any, *args: Any, **kwargs: Any):
        super().__init__(experiment_name, unwrap(distiller), *args, **kwargs)
        # Only for unscaling: fp16's scaler wants an optimizer of its own for the second gradients.
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self._views = {term: SGD(groups, lr=0.0) for term in self._kept}

    def init_optimizer(self, cfg: Any) -> Optimizer:
        solver = cfg.SOLVER
        if not 0 <= solver.DOT.DELTA <= solver.MOMENTUM:
            raise UserError(
                f"SOLVER.DOT.DELTA {solver.DOT.DELTA} must lie between 0 and "
                f"SOLVER.MOMENTUM {solver.MOMENTUM}"
            )
        if solver.MOMENTUM + solver.DOT.DELTA >= 1:
            raise UserError(
                f"SOLVER.MOMENTUM {solver.MOMENTUM} + SOLVER.DOT.DELTA {solver.DOT.DELTA}, the "
                "momentum of the distillation gradients, must be below 1"
            )
        return DistillationOrientedTrainer(
            self.checked_groups(solver),
            lr=solver.LR,
            momentum=solver.MOMENTUM - solver.DOT.DELTA,
            momentum_kd=solver.MOMENTUM + solver.DOT.DELTA,
            weight_decay=solver.WEIGHT_DECAY,
        )

    def checked_groups(self, solver: Any) -> list[dict[str, Any]]:
        """The parameter groups, after refusing settings that separate gradients do not support."""
        if solver.TYPE.upper() != "SGD" or solver.get("OPTIMIZER_ARGS"):
            raise UserError(
                f"SOLVER.TRAINER {solver.TRAINER} needs SOLVER.TYPE SGD, without OPTIMIZER_ARGS"
            )
        groups = student_groups(self.model.param_groups(), solver, self.model)
        if solver.SKIP_NONFINITE and any(p.is_cuda for group in groups for p in group["params"]):
            raise UserError(
                f"SOLVER.TRAINER {solver.TRAINER} cannot skip steps on a GPU; set "
                "SOLVER.SKIP_NONFINITE 0"
            )
        if solver.NESTEROV:
            raise UserError(
                f"SOLVER.TRAINER {solver.TRAINER} has no Nesterov form; set SOLVER.NESTEROV False"
            )
        return decay_groups(groups, solver)

    def backward(self, losses: dict[str, Tensor]) -> None:
        terms = ["loss_ce", *self._kept]
        if set(losses) != set(terms):
            number = {2: "two", 3: "three"}[len(terms)]
            raise UserError(
                f"trainer {self.cfg.SOLVER.TRAINER} needs the {number} terms "
                f"{', '.join(terms[:-1])} and {terms[-1]}, but "
                f"{self.cfg.DISTILLER.TYPE} gives {', '.join(losses)}; use SOLVER.TRAINER base"
            )
        weight = self.loss_weight()
        if self.begins_step:  # of a step that was left out, or that fp16's scaler did not make
            self.optimizer.forget()  # type: ignore[attr-defined]
        for term in self._kept:
            if losses[term].requires_grad:  # not where the main stage is cross-entropy alone
                with self._gradients_of(term):
                    self.scaler.scale(losses[term].mean() * weight).backward(retain_graph=True)
        self.scaler.scale(losses["loss_ce"].mean() * weight).backward()

    def gradients(self) -> list[Tensor]:
        return [*super().gradients(), *self._kept_gradients()]

    def update(self) -> None:
        for term, kept in self._kept.items():
            if kept:
                with self._gradients_of(term):
                    average_gradients(self._parameters())
                    self.scaler.unscale_(self._views[term])
        average_gradients(self._parameters())
        self._show_overflow_of_kept()
        self.scaler.unscale_(self.optimizer)
        super().update()

    @contextlib.contextmanager
    def _gradients_of(self, term: str) -> Iterator[None]:
        """In this context `.grad` holds the gradients of `term`, outside those of the task."""
        self.optimizer.swap_gradients(term)  # type: ignore[attr-defined]
        yield
        self.optimizer.swap_gradients(term)  # type: ignore[attr-defined]

    def _show_overflow_of_kept(self) -> None:
        """fp16: make an overflow of the kept gradients visible among the task's, without a sync.

        The scaler looks at the task gradients alone; infinity times zero puts a NaN among them.
        """
        if self.scaler.is_enabled() and self._kept_gradients():
            overflow = torch.stack([g.sum() for g in self._kept_gradients()]).sum() * 0.0
            next(p.grad for p in self._parameters() if p.grad is not None).add_(overflow)

    def clip_gradients(self) -> None:
        """Clip: scale all gradients by one factor, so that the norm of their sum is within the
        limit."""
        limit = self.cfg.SOLVER.CLIP_GRAD_NORM
        if not limit:
            return
        norms = []
        for param in self._parameters():
            parts = [param.grad, *(kept.get(id(param)) for kept in self._kept.values())]
            given = [gradient for gradient in parts if gradient is not None]
            if given:
                norms.append(torch.linalg.vector_norm(torch.stack(given).sum(dim=0)))
        factor = (limit / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        for gradient in [*gradients, *self._kept_gradients()]:
            gradient.mul_(factor)

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    @property
    def _kept(self) -> dict[str, dict[int, Tensor]]:
        """The stored gradients by term and id of the parameter."""
        return self.optimizer.kept  # type: ignore[attr-defined, no-any-return]

    def _kept_gradients(self) -> list[Tensor]:
        return [gradient for kept in self._kept.values() for gradient in kept.values()]
