"""From the gradients of micro-batches to steps of the optimizer and of its schedule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mdistiller.engine.optim import build_optimizer
from mdistiller.engine.optim.param_groups import require_scaled, student_groups
from mdistiller.engine.optim.schedules import build_scheduler, step_scheduler, step_settings
from mdistiller.registry import is_builtin


class Optimization:
    """The part of a trainer that moves the weights.

    Attributes of the trainer that it reads: `cfg`, `model`, `train_loader`, `step` (the micro-batch
    of the epoch, from 1), `accumulate`, `scaler`, `guard`, `call`.
    """

    cfg: Any
    model: Any
    train_loader: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    schedule_by_step: bool
    base_rates: list[float]
    scaler: Any
    accumulate: int
    epoch: int
    step: int
    processes: int
    guard: Any

    def call(self, moment: str, *args: Any) -> None:
        """Call a method of the hooks; see the trainer."""

    def init_optimizer(self, cfg: Any) -> Optimizer:
        """The optimizer over the distiller's parameter groups."""
        groups = student_groups(self.model.param_groups(), cfg.SOLVER, self.model)
        return build_optimizer(groups, cfg.SOLVER)

    def init_scheduler(self, cfg: Any) -> LRScheduler:
        """The schedule of the learning rate, moved on by :meth:`end_epoch` or, with
        SOLVER.SCHEDULE_BY step, by :meth:`optimize`."""
        return build_scheduler(self.optimizer, self.solver_cfg, self.schedule_steps)

    @property
    def solver_cfg(self) -> Any:
        """The SOLVER node whose steps and rates hold."""
        return self.cfg.SOLVER

    @property
    def schedule_steps(self) -> int:
        """Steps of the schedule in an epoch: 1, or those of the optimizer."""
        return -(-len(self.train_loader) // self.accumulate) if self.schedule_by_step else 1

    def check_rates(self) -> None:
        """Refuse rates by name or layer in a trainer that groups the parameters itself."""
        if not is_builtin(type(self).init_optimizer):
            require_scaled(self.optimizer.param_groups, self.cfg.SOLVER)

    def end_epoch(self, train_loss: float) -> None:
        """Move the schedule on by an epoch, whose mean training loss was `train_loss`."""
        if not self.schedule_by_step:
            step_scheduler(self.scheduler, train_loss)

    def step_settings(self) -> dict[str, Any]:
        """What of the config decides about steps and rates.

        A run that is resumed with other values goes on by them, its schedule begun anew.
        """
        settings = step_settings(self.solver_cfg)
        return settings | ({"STEPS": self.schedule_steps} if self.schedule_by_step else {})

    def restart_schedule(self, losses: Sequence[float]) -> None:
        """Begin the schedule anew, and bring it to where it is after epochs with these losses."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        self.scheduler = self.init_scheduler(self.cfg)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for loss in losses:
                self.end_epoch(loss)
            if self.schedule_by_step:
                done = -(-self.step // self.accumulate)  # of an epoch that is continued
                for _ in range(len(losses) * self.schedule_steps + done - 1):
                    self.scheduler.step()

    def optimize(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of a micro-batch; the last one of a step moves the weights."""
        if self.begins_step:
            if self.schedule_by_step and (self.epoch or self.step > 1):
                self.scheduler.step()  # here, so that an epoch records the rate of its last step
            self.optimizer.zero_grad(set_to_none=True)
        self.backward(losses)
        if self.ends_step and self.guard.allows(self, self.gradients()):
            self.update()
            self.call("after_update")

    @property
    def begins_step(self) -> bool:
        """Whether this micro-batch is the first one of its optimizer step."""
        return (self.step - 1) % self.accumulate == 0

    @property
    def ends_step(self) -> bool:
        """Whether this micro-batch is the last one of its optimizer step."""
        return self.step % self.accumulate == 0 or self.step == len(self.train_loader)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of the summed terms to those at hand."""
        total = torch.stack([loss.mean() for loss in losses.values()]).sum() * self.loss_weight()
        self.scaler.scale(total).backward()

    def gradients(self) -> list[Tensor]:
        """All that the coming step moves the weights by."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p.grad for p in params if p.grad is not None]

    def update(self) -> None:
        """One optimizer step by the gradients at hand."""
        self.clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def loss_weight(self) -> float:
        """Share of this process's micro-batch in the optimizer step, times the processes."""
        if self.accumulate == 1 and self.processes == 1:
            return 1.0
        weight = getattr(self.train_loader, "loss_weight", None)
        if weight is not None:
            share: float = weight(self.step - 1, self.accumulate)
            return share
        if self.accumulate == 1:
            return 1.0
        done = (self.step - 1) // self.accumulate * self.accumulate
        return 1 / min(self.accumulate, len(self.train_loader) - done)  # taken as equally large

    def clip_gradients(self) -> None:
        """Scale the gradients down to SOLVER.CLIP_GRAD_NORM, if that is set."""
        limit = self.cfg.SOLVER.CLIP_GRAD_NORM
        if limit:
            self.scaler.unscale_(self.optimizer)
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, limit)
