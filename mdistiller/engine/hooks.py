"""What happens around the training loop is done by hooks, in list order; this is their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Record = dict[str, Any]


class Trainer(Protocol):
    """What a hook may read of a trainer; :class:`~mdistiller.engine.trainer.BaseTrainer` has it.

    Attributes:
        cfg: the whole config.
        model: the distiller, never wrapped; `distiller` may be wrapped for several processes.
        epoch: the last finished epoch; `step`: micro-batches of the one under way.
        best_acc: percent, in `best_epoch`.
        history: one record per epoch.
        stage: name of a method's initialisation stage, "" in the main one.
        position: where in an epoch to continue, or what to save of it.
    """

    cfg: Any
    model: Any
    distiller: nn.Module
    device: torch.device
    train_loader: Any
    val_loader: Any
    log_path: Path
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: Any
    accumulate: int
    epoch: int
    step: int
    stage: str
    best_acc: float
    best_epoch: int
    history: list[dict[str, Any]]
    init_state: dict[str, Any] | None
    position: dict[str, Any] | None
    teacher_cache: Any
    guard: Any
    hooks: list[Hook]

    @property
    def fresh(self) -> bool: ...
    @property
    def global_step(self) -> int: ...
    @property
    def begins_step(self) -> bool: ...
    def log(self, lr: float, epoch: int, log_dict: dict[str, Any]) -> None: ...
    def evaluate(self) -> dict[str, float]: ...
    def progress_line(self, record: Record) -> str: ...
    def state(self) -> dict[str, Any]: ...
    def save(self) -> None: ...
    def seed_epoch(self, epoch: int) -> None: ...
    def step_settings(self) -> dict[str, Any]: ...
    def restart_schedule(self, losses: Sequence[float]) -> None: ...


class Hook:
    """Base of all hooks: does nothing. A subclass overrides the moments it cares about."""

    def before_train(self, trainer: Trainer) -> None:
        """Once, before the first epoch of this process."""

    def on_resume(self, trainer: Trainer, log_sizes: Mapping[str, int]) -> None:
        """After a checkpoint was loaded; `log_sizes` are the bytes of each log at its time."""

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """After a checkpoint was loaded: take what :meth:`state` once gave, if it is there."""

    def after_update(self, trainer: Trainer) -> None:
        """After every step of the optimizer in the main stage."""

    def after_steps(self, trainer: Trainer, meters: Mapping[str, Any]) -> None:
        """Every LOG.TENSORBOARD_FREQ steps, with the means of the epoch so far."""

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        """After each epoch; `record` holds its numbers and may be added to."""

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        """Log an epoch's numbers."""

    def before_save(self, trainer: Trainer) -> None:
        """Before a checkpoint is written: make durable what was logged."""

    def save(self, trainer: Trainer) -> None:
        """Between two steps, when the state of the run is to be kept."""

    def sizes(self, trainer: Trainer) -> dict[str, int]:
        """Bytes of the log files that this hook appends to, by name."""
        return {}

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint is to hold beside the trainer's own entries."""
        return {}

    def networks(self, trainer: Trainer, epoch: int) -> dict[str, nn.Module]:
        """Networks to be kept in files of their own after an epoch, by the files' names."""
        return {}

    def after_train(self, trainer: Trainer) -> None:
        """Once, after the last epoch."""

    def summarize(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        """What the run's summary is to hold beside the trainer's own entries."""
        return {}

    def abandon(self, trainer: Trainer) -> None:
        """Instead of `after_train` where an exception ends the training."""
