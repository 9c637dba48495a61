"""Optimizers and learning-rate schedules from a config."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from mdistiller.registry import Registry

OPTIMIZERS = Registry("optimizer (SOLVER.TYPE)")


@OPTIMIZERS.register("SGD")
def sgd(groups: list[dict[str, Any]], solver: Any) -> Optimizer:
    """SGD with momentum; weight decay on everything, as the published recipes have it."""
    return SGD(
        groups,
        lr=solver.LR,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        nesterov=solver.NESTEROV,
        **_maskable(groups, solver),
    )


@OPTIMIZERS.register("Adam")
def adam(groups: list[dict[str, Any]], solver: Any) -> Optimizer:
    decay = solver.WEIGHT_DECAY
    return Adam(groups, lr=solver.LR, weight_decay=decay, **_maskable(groups, solver))


@OPTIMIZERS.register("AdamW")
def adamw(groups: list[dict[str, Any]], solver: Any) -> Optimizer:
    decay = solver.WEIGHT_DECAY
    return AdamW(groups, lr=solver.LR, weight_decay=decay, **_maskable(groups, solver))


def _maskable(groups: list[dict[str, Any]], solver: Any) -> dict[str, Any]:
    """The option that lets a GPU decide by itself to leave a step out (see `non_finite.py`)."""
    on_gpu = any(param.is_cuda for group in groups for param in group["params"])
    return {"fused": True} if solver.SKIP_NONFINITE and on_gpu else {}


def build_optimizer(groups: list[dict[str, Any]], solver: Any) -> Optimizer:
    """The optimizer of `cfg.SOLVER` over parameter groups.

    Args:
        groups: as torch takes them; groups may set their own `lr` and `weight_decay`.
        solver: the SOLVER node.
    """
    seen: set[int] = set()
    for group in groups:  # a parameter in two places would be stepped twice
        params = {id(p): p for p in group["params"] if id(p) not in seen}
        seen |= set(params)
        group["params"] = list(params.values())
    return OPTIMIZERS[solver.TYPE](decay_groups(groups, solver), solver)


def decay_groups(groups: list[dict[str, Any]], solver: Any) -> list[dict[str, Any]]:
    """The groups, with biases and the parameters of norms apart where SOLVER.NORM_DECAY is False.

    Those (all with less than two dimensions, as is usual for transformers) then have no decay.
    """
    if solver.NORM_DECAY:
        return groups
    split = []
    for group in groups:
        wide = [param for param in group["params"] if param.ndim > 1]
        narrow = [param for param in group["params"] if param.ndim <= 1]
        split += [{**group, "params": wide}] if wide else []
        split += [{**group, "params": narrow, "weight_decay": 0.0}] if narrow else []
    return split


_STEP_KEYS = (
    *("LR", "SCHEDULE", "LR_DECAY_STAGES", "LR_DECAY_RATE", "PATIENCE", "WARMUP_EPOCHS", "MIN_LR"),
    *("WEIGHT_DECAY", "NORM_DECAY", "MOMENTUM", "NESTEROV", "SKIP_NONFINITE"),
)


def build_scheduler(optimizer: Optimizer, solver: Any) -> LRScheduler:
    """The schedule of `cfg.SOLVER`, to be stepped once after every epoch.

    A stage s of LR_DECAY_STAGES is the last epoch (counted from 1) at the old rate. WARMUP_EPOCHS
    epochs rise linearly to LR and are part of EPOCHS; the stages are not shifted by them. "plateau"
    multiplies by LR_DECAY_RATE after more than PATIENCE epochs without a lower training loss.
    """
    warmup = solver.WARMUP_EPOCHS
    main: LRScheduler
    if solver.SCHEDULE == "multistep":
        stages = [stage - warmup for stage in solver.LR_DECAY_STAGES]
        main = MultiStepLR(optimizer, stages, gamma=solver.LR_DECAY_RATE)
    elif solver.SCHEDULE == "cosine":
        epochs = max(solver.EPOCHS - warmup, 1)
        main = CosineAnnealingLR(optimizer, epochs, eta_min=solver.MIN_LR)
    elif solver.SCHEDULE == "plateau":
        factor, patience = solver.LR_DECAY_RATE, solver.PATIENCE
        return ReduceLROnPlateau(optimizer, "min", factor, patience, min_lr=solver.MIN_LR)
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])


def step_settings(solver: Any) -> dict[str, Any]:
    """What of `cfg.SOLVER` decides about steps and rates."""
    keys = [*_STEP_KEYS, *(["EPOCHS"] if solver.SCHEDULE == "cosine" else [])]
    return {"DELTA": solver.DOT.DELTA, **{key: solver[key] for key in keys}}


def step_scheduler(scheduler: LRScheduler, train_loss: float) -> None:
    """Move a schedule on by one epoch, whose mean training loss was `train_loss`."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(train_loss)
    else:
        scheduler.step()


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The mixed-precision context of `SOLVER.AMP`; without effect for "none"."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
