"""Hooks act at named moments of the training loop, in list order; this is their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mdistiller.registry import Registry, UserError

HOOKS = Registry("hook (HOOKS)")
"""Subclasses of :class:`Hook` that a config can name, by ``@HOOKS.register("my_hook")``."""

Record = dict[str, Any]


class Trainer(Protocol):
    """What a hook may read of a trainer; :class:`~mdistiller.engine.trainer.BaseTrainer` has it.

    Attributes:
        cfg: the whole config.
        model: the distiller, never wrapped; `distiller` may be wrapped for several processes.
        epoch: the last finished epoch, of `epochs`; `step`: micro-batches of the one under way.
        progress: of the epoch under way: its meters and what it has taken.
        best_acc: percent, in `best_epoch`, which LOG.SELECT_BY (`select_by`) decides by
            `best_score`; the largest is the best.
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
    progress: Any
    stage: str
    best_acc: float
    best_epoch: int
    best_score: float
    history: list[dict[str, Any]]
    init_state: dict[str, Any] | None
    position: dict[str, Any] | None
    hooks: list[Hook]

    @property
    def epochs(self) -> int: ...
    @property
    def fresh(self) -> bool: ...
    @property
    def select_by(self) -> str: ...
    @property
    def global_step(self) -> int: ...
    @property
    def begins_step(self) -> bool: ...
    @property
    def ends_step(self) -> bool: ...
    def call(self, moment: str, *args: Any) -> None: ...
    def log(self, lr: float, epoch: int, log_dict: dict[str, Any]) -> None: ...
    def evaluate(self) -> dict[str, float]: ...
    def columns(self, record: Record) -> dict[str, str]: ...
    def best(self) -> dict[str, float]: ...
    def epochs_left(self, epoch: int) -> int: ...
    def state(self) -> dict[str, Any]: ...
    def save(self) -> None: ...
    def seed_epoch(self, epoch: int) -> None: ...
    def step_settings(self) -> dict[str, Any]: ...
    def restart_schedule(self, losses: Sequence[float]) -> None: ...


class Hook:
    """Base of all hooks: does nothing. A subclass overrides the moments it cares about.

    Class attributes:
        moments: names of the methods that a subclass overrides; only these are called.
    """

    moments: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        names = [name for name in vars(Hook) if not name.startswith("_")]
        cls.moments = frozenset(n for n in names if getattr(cls, n) is not getattr(Hook, n))

    def before_train(self, trainer: Trainer) -> None:
        """Once, before the first epoch of this process."""

    def on_resume(self, trainer: Trainer, log_sizes: Mapping[str, int]) -> None:
        """After a checkpoint was loaded; `log_sizes` are the bytes of each log at its time."""

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """After a checkpoint was loaded: take what :meth:`state` once gave, if it is there."""

    def before_epoch(self, trainer: Trainer, saved: Mapping[str, Any]) -> None:
        """Before the first step of an epoch, or the first after resuming within one.

        `saved` then holds what :meth:`epoch_state` gave in this process; else it is empty.
        """

    def before_forward(self, trainer: Trainer, inputs: dict[str, Any]) -> None:
        """Before the forward pass of a micro-batch; `inputs` go to the distiller."""

    def after_forward(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        """After it, with the loss terms, before the backward pass."""

    def after_update(self, trainer: Trainer) -> None:
        """After every step of the optimizer in the main stage."""

    def after_steps(self, trainer: Trainer, meters: Any) -> None:
        """Every LOG.TENSORBOARD_FREQ micro-batches, with the means of the epoch so far."""

    def after_step(self, trainer: Trainer) -> None:
        """After every micro-batch."""

    def epoch_numbers(self, trainer: Trainer) -> dict[str, float]:
        """Numbers for the epoch's record, after its last step and before the evaluation."""
        return {}

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        """After each epoch; `record` holds its numbers and may be added to."""

    def columns(self, trainer: Trainer, record: Record) -> dict[str, str]:
        """What the epoch's printed line has beside the trainer's own cells, by title."""
        return {}

    def write(self, trainer: Trainer, epoch: int, record: Record) -> None:
        """Log an epoch's numbers."""

    def before_save(self, trainer: Trainer) -> None:
        """Before a checkpoint is written: make durable what was logged."""

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint, after an epoch or within one."""

    def sizes(self, trainer: Trainer) -> dict[str, int]:
        """Bytes of the log files that this hook appends to, by name."""
        return {}

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint holds beside the trainer's own entries."""
        return {}

    def epoch_state(self, trainer: Trainer) -> dict[str, Any]:
        """What this process needs to continue within the epoch; called in every process."""
        return {}

    def networks(self, trainer: Trainer, epoch: int) -> dict[str, nn.Module]:
        """Networks to save in files of their own after an epoch, by the files' names."""
        return {}

    def after_train(self, trainer: Trainer) -> None:
        """Once, after the last epoch."""

    def summarize(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        """What the run's summary holds beside the trainer's own entries."""
        return {}

    def after_summary(self, trainer: Trainer, summary: Mapping[str, Any]) -> None:
        """Once, with the whole summary, after it was written."""

    def abandon(self, trainer: Trainer) -> None:
        """Instead of `after_train` where an exception ends the training."""


def named_hooks(names: Sequence[str]) -> list[Hook]:
    """New hooks of the registered classes.

    Raises:
        UserError: a name is not registered, or its class is not a hook without arguments.
    """
    hooks = []
    for name in names:
        try:
            hook = HOOKS[name]()
        except TypeError as error:
            raise UserError(f"HOOKS: {name} must take no arguments ({error})") from error
        if not isinstance(hook, Hook):
            raise UserError(f"HOOKS: {name} is a {type(hook).__name__}, not a mdistiller.Hook")
        hooks.append(hook)
    return hooks
