"""Training on images without labels: records of losses, no accuracy.

The best epoch is that of the lowest loss: on the images of DATASET.VAL_SPLIT (or on the test images
of a labelled set, without their labels), else in training. With LOG.PROBE it is that of the highest
k-NN accuracy on the labelled images given there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mdistiller.console import print_log, progress
from mdistiller.distillers.helpers.training.gather import local_batches
from mdistiller.distributed import broadcast_buffers, is_main_process, sum_over_ranks
from mdistiller.engine.callbacks.ema import AverageStudent
from mdistiller.engine.callbacks.probe import KEY
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import UserError


class UnlabelledTrainer(BaseTrainer):
    """Trains a method that needs no labels (`Distiller.needs_labels`)."""

    selects = "test_loss"

    def __init__(self, *args: Any):
        super().__init__(*args)
        if self.cfg.LOG.PROBE:
            self.selects, self.selected_on = KEY, f"labelled images of {self.cfg.LOG.PROBE}"
        elif self.val_loader is None:
            self.selects = "train_loss"

    @property
    def select_by(self) -> str:
        return "k-NN accuracy" if self.selects == KEY else "loss"

    def make_hooks(self, cfg: Any) -> list[Hook]:
        reports: list[Hook] = [ReportUntrained()] if is_main_process() else []
        hooks = [
            AverageUnlabelled() if isinstance(hook, AverageStudent) else hook
            for hook in super().make_hooks(cfg)
        ]
        return [*hooks, *reports]

    @classmethod
    def check(cls, cfg: Any, train_loader: Any = None) -> None:
        keys = {
            "SOLVER.CUDA_GRAPHS": cfg.SOLVER.CUDA_GRAPHS,
            "SOLVER.QAT_EPOCHS": cfg.SOLVER.QAT_EPOCHS,
            "SOLVER.LABEL_SMOOTHING": cfg.SOLVER.LABEL_SMOOTHING,
            "DISTILLER.CLASS_WEIGHTS": cfg.DISTILLER.CLASS_WEIGHTS != "none",
            "LOG.MISTAKES": cfg.LOG.MISTAKES,
            "DATASET.SAMPLER": cfg.DATASET.SAMPLER == "balanced",
        }
        for key, wanted in keys.items():
            if wanted:
                raise UserError(f"{key} does not work on data without labels: leave it out")
        super().check(cfg, train_loader)

    def measure(self, output: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        return {}, len(inputs["target"])

    def train_numbers(self, means: dict[str, float]) -> dict[str, float]:
        loss = means.pop("losses")
        return {"train_loss": loss, **{f"train_{name}": value for name, value in means.items()}}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss on `val_loader`, with the student in eval mode; nothing without images.

        Losses that relate images see the batches of DATASET.TEST.BATCH_SIZE of one process.
        """
        if self.val_loader is None:
            return {}
        self.model.eval()
        totals = torch.zeros(2, device=self.device)  # summed loss, samples
        with local_batches(), self.autocast:
            for batch in progress(self.val_loader, "eval"):
                image, target = (item.to(self.device, non_blocking=True) for item in batch[:2])
                _, losses = self.model.forward_train(image=image, target=target, epoch=self.epoch)
                loss = torch.stack([term.float().mean() for term in losses.values()]).sum()
                totals += torch.stack([loss * len(image), loss.new_tensor(len(image))])
        loss, samples = sum_over_ranks(totals).tolist()
        return {"test_loss": loss / samples}

    def columns(self, record: dict[str, Any]) -> dict[str, str]:
        cells = {}
        if "test_loss" in record:
            cells["eval loss"] = f"{record['test_loss']:.4f}"
        if self.cfg.LOG.PROBE:
            cells["k-NN %"] = f"{record[KEY]:.2f}" if KEY in record else "-"
        title = "k-NN %" if self.selects == KEY else "eval loss"
        return {k: self.marked(v) if k == title else v for k, v in cells.items()}

    def score(self, record: Mapping[str, Any]) -> float:
        """The k-NN accuracy, or minus the loss."""
        return float(record.get(KEY, -1.0)) if self.selects == KEY else -float(record[self.selects])

    def best(self) -> dict[str, float]:
        return {"best_knn" if self.selects == KEY else "best_loss": self.best_acc}


class AverageUnlabelled(AverageStudent):
    """A moving average that no accuracy judges: `student_ema_latest` alone (`eval --probe`)."""

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        assert self.average is not None
        broadcast_buffers(self.average)

    def columns(self, trainer: Trainer, record: Record) -> dict[str, str]:
        return {}

    def summarize(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        return {}


class ReportUntrained(Hook):
    """Prints once which of the student's weights the loss does not reach, so they stay random."""

    def __init__(self) -> None:
        self.done = False

    def after_update(self, trainer: Trainer) -> None:
        if self.done:
            return
        self.done = True
        named = [(n, p) for n, p in trainer.model.student.named_parameters() if p.requires_grad]
        untrained = [name for name, param in named if param.grad is None]
        if untrained:
            text = (
                f"WARNING: {trainer.cfg.DISTILLER.TYPE} does not train {len(untrained)} of the "
                f"student's {len(named)} tensors, which stay random (the first: {untrained[0]}): "
                "choose a later layer or another method, or add one that reads the last features"
            )
            print_log(text)


def why_unlabelled(cfg: Any) -> str:
    """The keys by which data have no labels, for errors."""
    reason = "" if cfg.DATASET.LABELS else ", DATASET.LABELS False"
    return f"DATASET.TYPE {cfg.DATASET.TYPE}{reason}"


def require_base(cfg: Any, trainer: type[BaseTrainer]) -> type[BaseTrainer]:
    """The trainer for data without labels.

    Raises:
        UserError: the config asks for one that reads labels.
    """
    if trainer is not BaseTrainer:
        raise UserError(
            f"SOLVER.TRAINER {cfg.SOLVER.TRAINER} reads labels, and these data have none "
            f"({why_unlabelled(cfg)}): set it to base"
        )
    UnlabelledTrainer.check(cfg)
    return UnlabelledTrainer
