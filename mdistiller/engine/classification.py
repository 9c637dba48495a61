"""What a trainer measures of a classifier, and which epoch it calls the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mdistiller.distillers.helpers.training.checks import logits_of
from mdistiller.engine.callbacks.console import BEST
from mdistiller.engine.metrics import SELECT_BY, score_of
from mdistiller.engine.utils import correct_counts, evaluate


class Classification:
    """The part of a trainer that measures; another task overrides what differs.

    Class attributes:
        selects: the key of the evaluation that `best_acc` is of, in percent; the best epoch is
            chosen by it unless LOG.SELECT_BY says otherwise.
        selected_on: the images of that evaluation in words; "": those of the run's `val_loader`.
    """

    selects: str = "test_acc"
    selected_on: str = ""
    cfg: Any
    model: Any
    distiller: Any
    val_loader: Any
    epoch: int
    best_acc: float
    best_epoch: int

    @property
    def select_by(self) -> str:
        """LOG.SELECT_BY: what the best epoch is chosen by."""
        by: str = self.cfg.LOG.get("SELECT_BY", "top1")
        return by

    def measure(self, output: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        """Metrics of a micro-batch, to be averaged over the epoch, and its number of samples.

        Args:
            output: the distiller's first result: logits.
            inputs: the distiller's keyword arguments.
        """
        target = inputs["target"]
        logits = logits_of(self.model, output, len(target))
        hits = correct_counts(logits, target) * (100.0 / len(target))
        return {"top1": hits[0], "top5": hits[1]}, len(target)

    def train_numbers(self, means: dict[str, float]) -> dict[str, float]:
        """The epoch's training means under the names of the record."""
        accuracy, loss = means.pop("top1", 0.0), means.pop("losses", 0.0)
        others = {f"train_{name}": value for name, value in means.items()}
        return {"train_acc": accuracy, "train_loss": loss, **others}

    def evaluate(self) -> dict[str, float]:
        """Evaluate the student on `val_loader`; the result includes the key :attr:`selects`."""
        numbers = evaluate(self.val_loader, self.distiller)
        return {f"test_{name}": value for name, value in numbers.items()}

    def columns(self, record: dict[str, Any]) -> dict[str, str]:
        """What an epoch's printed line has behind the loss, by title."""
        score, by = "eval %", self.select_by
        cells = {"train %": f"{record['train_acc']:.2f}", score: f"{record['test_acc']:.2f}"}
        if by != "top1":
            score = "eval loss" if by == "loss" else by.removesuffix("_accuracy")
            cells[score] = f"{record[SELECT_BY[by]]:.{4 if by == 'loss' else 2}f}"
        cells[score] = self.marked(cells[score])
        return cells

    def marked(self, score: str) -> str:
        """A score as printed, with a mark if the epoch is the best so far."""
        return score + (BEST if self.best_epoch == self.epoch else " ")

    def score(self, record: Mapping[str, Any]) -> float:
        """What the best epoch has most of."""
        if self.select_by != "top1":
            return score_of(record, self.select_by)
        return float(record.get(self.selects, -1.0))

    def best(self) -> dict[str, float]:
        """The best epoch's number, by its name in logs and summary."""
        return {"best_acc": self.best_acc}
