"""The stages that a method trains before the main one (docs/method.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

from mdistiller.distillers import Distiller
from mdistiller.engine.callbacks.default import saved_state
from mdistiller.engine.callbacks.logs import AppendedFile, TensorBoard, plain
from mdistiller.engine.checkpoints.resume import (
    restore_position,
    restore_schedule,
    schedule_state,
    seed_everything,
)
from mdistiller.engine.checkpoints.store import LATEST, Store
from mdistiller.engine.distributed import is_main_process, wrap
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.optim import build_optimizer
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.utils import log_msg
from mdistiller.registry import UserError
from mdistiller.runtime import rank

STRIDE = 10**6
"""Distance of the epoch numbers that the loader gets in one stage and the next."""


@contextlib.contextmanager
def running(model: Distiller, stage: str) -> Iterator[list[dict[str, Any]]]:
    """`model` in an initialisation stage, whose parameter groups are given.

    Its forward is the stage's, and no other parameters have gradients: they stay as they are to
    the bit. Afterwards the model is as before, without gradients.
    """
    groups = model.init_stages()[stage].init_param_groups()
    trained = {id(param) for group in groups for param in group["params"]}
    before = [(param, param.requires_grad) for param in model.parameters()]
    try:
        model.init_stage = stage
        for param, _ in before:
            param.requires_grad_(id(param) in trained)
        yield groups
    finally:
        model.init_stage = ""
        for param, wanted in before:
            param.requires_grad_(wanted)
            param.grad = None


def run_init_stages(main: BaseTrainer) -> None:
    """Run the method's stages one after the other, or what a resumed run has left of them."""
    stages = list(main.model.init_stages())
    done = main.init_state or {"stage": "", "epoch": 0}
    if done["stage"] and done["stage"] not in stages:
        raise UserError(
            f"the checkpoint is of the stage {done['stage']!r}, which this config does not have"
        )
    first = stages.index(done["stage"]) if done["stage"] else 0
    for number, stage in enumerate(stages[first:], start=first + 1):
        with running(main.model, stage) as groups:
            trainer = InitTrainer(main, stage, number, groups)
            if stage == done["stage"]:
                trainer.load(done)
            trainer.train()
    main.init_state = None


class InitTrainer(BaseTrainer):
    """Trains an initialisation stage for the trainer of the run, with a fresh optimizer.

    Whatever that trainer is, a step here is a plain one, SOLVER.TYPE on the sum of the stage's
    terms; only the making of a batch's inputs is the other's. Rate and schedule are the stage's,
    everything else in SOLVER holds.

    Args:
        main: the run's trainer.
        stage: name of the stage.
        number: its place, from 1.
        groups: the parameter groups to train.
    """

    def __init__(self, main: BaseTrainer, stage: str, number: int, groups: list[dict[str, Any]]):
        self.main, self.number, self.groups = main, number, groups
        plan = main.model.init_stages()[stage].init
        cfg = main.cfg.clone()
        cfg.defrost()
        cfg.DISTILLER.TEACHER_CACHE = "none"  # such a stage reads features
        cfg.SOLVER.EPOCHS, cfg.SOLVER.LR = plan.epochs, plan.lr or cfg.SOLVER.LR
        cfg.SOLVER.SCHEDULE, cfg.SOLVER.WARMUP_EPOCHS = "multistep", 0
        cfg.SOLVER.LR_DECAY_STAGES = list(plan.decay_stages)
        cfg.SOLVER.LR_DECAY_RATE = plan.decay_rate
        wrapped = wrap(main.model, cfg.SOLVER.FIND_UNUSED_PARAMETERS)
        super().__init__("", wrapped, main.train_loader, main.val_loader, cfg)
        self.log_path, self.stage = main.log_path, stage
        self.hooks = [LogInit()]
        if is_main_process():
            self.hooks += [TensorBoard(), CheckpointInit()]

    def init_optimizer(self, cfg: Any) -> Optimizer:
        return build_optimizer(self.groups, cfg.SOLVER)

    def initialize(self) -> None:
        """Nothing: this is the initialisation."""

    def seed_epoch(self, epoch: int) -> None:
        seed_everything(self.cfg.EXPERIMENT.SEED, epoch, rank(), self.number)
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(self.number * STRIDE + epoch)

    def batch_inputs(self, data: Sequence[Any], epoch: int) -> dict[str, Any]:
        return self.main.batch_inputs(data, epoch)

    def log(self, lr: float, epoch: int, log_dict: dict[str, float]) -> None:
        """Write an epoch's numbers to the files of the run and to TensorBoard."""
        files = [hook for hook in self.main.hooks if isinstance(hook, AppendedFile)]
        for hook in [*files, *self.hooks]:
            hook.write(self, epoch, {"lr": lr, **log_dict})

    def state(self) -> dict[str, Any]:
        """The run's state, and under "init" what the stage adds to it."""
        own = {
            "stage": self.stage,
            "epoch": self.epoch,
            "position": self.position,
            **schedule_state(self),
        }
        return {**self.main.state(), "init": own}

    def load(self, own: dict[str, Any]) -> None:
        """Continue from what :meth:`state` holds under "init"."""
        self.epoch = own["epoch"]
        restore_schedule(self, own, self.log_path)
        restore_position(self, own.get("position"))


class LogInit(Hook):
    """Prints a line an epoch, and has it written to the logs."""

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        # Accuracy says nothing here: the classifier is not trained, or did not run.
        numbers = {key: record[key] for key in record if key not in ("train_acc", "train_top5")}
        trainer.log(numbers.pop("lr"), epoch, plain(numbers))
        if is_main_process():
            line = (
                f"{trainer.stage} epoch {epoch}/{trainer.cfg.SOLVER.EPOCHS}  "
                f"lr {record['lr']:.3g}  train loss {record['train_loss']:.4f}  "
                f"{record['images_per_second']:.0f} images/s"
            )
            print(log_msg(line, "TRAIN"), flush=True)


class CheckpointInit(Hook):
    """Saves `latest`, from which the stage continues."""

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        facts = {"stage": trainer.stage, "stage_epoch": trainer.epoch, "step": trainer.step}
        Store(trainer.log_path).save(saved_state(trainer), LATEST, **facts)
