"""Learning-rate schedules from a config, counted in epochs or in optimizer steps.

A schedule is a function (optimizer, solver, per_epoch) -> LRScheduler, registered for
SOLVER.SCHEDULE. It begins after the warm-up, and is stepped `per_epoch` times an epoch: once, or
with SOLVER.SCHEDULE_BY step after each optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from mdistiller.config.checks import SCHEDULES
from mdistiller.registry import UserError

__all__ = ["SCHEDULES", "build_scheduler", "by_step", "depends_on_epochs", "step_settings"]


@SCHEDULES.register("multistep")
def multistep(optimizer: Optimizer, solver: Any, per_epoch: int) -> LRScheduler:
    """Times LR_DECAY_RATE after each of LR_DECAY_STAGES, the last epochs (from 1) at a rate."""
    stages = [(stage - solver.WARMUP_EPOCHS) * per_epoch for stage in solver.LR_DECAY_STAGES]
    return MultiStepLR(optimizer, stages, gamma=solver.LR_DECAY_RATE)


@SCHEDULES.register("cosine")
def cosine(optimizer: Optimizer, solver: Any, per_epoch: int) -> LRScheduler:
    """Half a cosine from LR to MIN_LR; other rates (LR_BY_NAME, LAYER_DECAY) fall in proportion."""
    steps = max(solver.EPOCHS - solver.WARMUP_EPOCHS, 1) * per_epoch
    if not (solver.MIN_LR and any("lr_scale" in group for group in optimizer.param_groups)):
        return CosineAnnealingLR(optimizer, steps, eta_min=solver.MIN_LR)
    end = solver.MIN_LR / solver.LR
    return LambdaLR(optimizer, lambda k: end + (1 - end) * (1 + math.cos(math.pi * k / steps)) / 2)


@SCHEDULES.register("plateau")
def plateau(optimizer: Optimizer, solver: Any, per_epoch: int) -> LRScheduler:
    """Times LR_DECAY_RATE after more than PATIENCE epochs without a lower training loss."""
    lowest = [solver.MIN_LR * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    factor, patience = solver.LR_DECAY_RATE, solver.PATIENCE
    return ReduceLROnPlateau(optimizer, "min", factor, patience, min_lr=lowest)


@SCHEDULES.register("constant")
def constant(optimizer: Optimizer, solver: Any, per_epoch: int) -> LRScheduler:
    """LR throughout."""
    return ConstantLR(optimizer, factor=1.0)


def build_scheduler(optimizer: Optimizer, solver: Any, per_epoch: int = 1) -> LRScheduler:
    """The schedule of `cfg.SOLVER`, to be stepped `per_epoch` times an epoch.

    WARMUP_EPOCHS epochs rise linearly to LR and are part of EPOCHS; LR_DECAY_STAGES are not shifted
    by them.

    Raises:
        UserError: the schedule is unknown, or needs the loss of each epoch and cannot have it.
    """
    main: LRScheduler = SCHEDULES[solver.SCHEDULE](optimizer, solver, per_epoch)
    warmup = solver.WARMUP_EPOCHS * per_epoch
    if isinstance(main, ReduceLROnPlateau) and (warmup or by_step(solver)):
        raise UserError(
            f"SOLVER.SCHEDULE {solver.SCHEDULE} follows the loss of each epoch: set "
            "SOLVER.WARMUP_EPOCHS 0 and SOLVER.SCHEDULE_BY epoch"
        )
    if not warmup:
        return main
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])


def by_step(solver: Any) -> bool:
    """Whether the schedule moves on after each optimizer step."""
    return bool(solver.get("SCHEDULE_BY") == "step")


def depends_on_epochs(solver: Any) -> bool:
    """Whether other EPOCHS change the rates of the epochs before."""
    return solver.SCHEDULE not in ("multistep", "plateau", "constant")


_STEP_KEYS = (
    *("LR", "SCHEDULE", "LR_DECAY_STAGES", "LR_DECAY_RATE", "PATIENCE", "WARMUP_EPOCHS", "MIN_LR"),
    *("WEIGHT_DECAY", "NORM_DECAY", "MOMENTUM", "NESTEROV", "SKIP_NONFINITE"),
)
_NEWER_KEYS = {
    "LR_BY_NAME": [],
    "LAYER_DECAY": 1.0,
    "SCHEDULE_BY": "epoch",
    "OPTIMIZER_ARGS": {},
}
"""Keys that count where they are set: checkpoints from before they existed lack them."""


def step_settings(solver: Any) -> dict[str, Any]:
    """What of `cfg.SOLVER` decides about steps and rates, as plain values."""
    keys = [*_STEP_KEYS, *(["EPOCHS"] if depends_on_epochs(solver) else [])]
    keys += [key for key, plain in _NEWER_KEYS.items() if solver.get(key, plain) != plain]
    values = {key: solver[key] for key in keys}
    plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return {"DELTA": solver.DOT.DELTA, **plain}


def step_scheduler(scheduler: LRScheduler, train_loss: float) -> None:
    """Move a schedule on by one epoch, whose mean training loss was `train_loss`."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(train_loss)
    else:
        scheduler.step()
