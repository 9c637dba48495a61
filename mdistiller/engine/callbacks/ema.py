"""The moving average of the student's weights (SOLVER.EMA)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mdistiller.distillers import Distiller, Vanilla
from mdistiller.distributed import broadcast_buffers
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.metrics import score_of
from mdistiller.engine.utils import evaluate, last_and_best
from mdistiller.registry import UserError


@torch.no_grad()
def move_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Update `average` in place: average = decay * average + (1 - decay) * net.

    Buffers are averaged as well; integer ones (counters) are copied. torch's AveragedModel would
    synchronise with the device in every step.
    """
    pairs = [
        (averaged, value)
        for of in (nn.Module.parameters, nn.Module.buffers)
        for averaged, value in zip(of(average), of(net), strict=True)
    ]
    smooth = [pair for pair in pairs if pair[0].is_floating_point()]
    if smooth:
        averaged, values = map(list, zip(*smooth, strict=True))
        get_ema_multi_avg_fn(decay)(averaged, values, None)
    for count, value in pairs:
        if not count.is_floating_point():
            count.copy_(value)


class AverageStudent(Hook):
    """Keeps an exponential moving average of the student and evaluates it each epoch.

    Weights and running statistics are averaged after every optimizer step, counters copied (as in
    timm); it starts as the weights after the first step. The epoch's record gets `ema_test_acc` and
    the like; `student_ema_latest` and `student_ema_best` (by its own accuracy) are files like
    `student_latest`, and checkpoints hold it for the resumed run.

    Attributes:
        average: the averaged student, None before training.
        updates: steps that went into it.
        best_acc, best_epoch: of the averaged student.
    """

    def __init__(self) -> None:
        self.average: nn.Module | None = None
        self.updates = 0
        self.best_acc, self.best_epoch, self.best_score = -1.0, 0, -math.inf

    def before_train(self, trainer: Trainer) -> None:
        if type(trainer.model).forward_test is not Distiller.forward_test:
            raise UserError(
                f"SOLVER.EMA averages the student alone, but {trainer.cfg.DISTILLER.TYPE} predicts "
                "with more than the student: set it to 0"
            )
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> nn.Module:
        if self.average is None:
            self.average = copy.deepcopy(trainer.model.student).requires_grad_(False)
        return self.average

    def after_update(self, trainer: Trainer) -> None:
        assert self.average is not None
        decay = trainer.cfg.SOLVER.EMA if self.updates else 0.0
        move_average(self.average, trainer.model.student, decay)
        self.updates += 1

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        assert self.average is not None
        student = self.average
        broadcast_buffers(student)
        numbers = evaluate(trainer.val_loader, Vanilla(student))
        record.update({f"ema_test_{name}": value for name, value in numbers.items()})
        score = score_of(record, trainer.select_by, "ema_")
        if score >= self.best_score:
            self.best_score, self.best_acc, self.best_epoch = score, numbers["acc"], epoch

    def columns(self, trainer: Trainer, record: Record) -> dict[str, str]:
        return {"ema %": f"{record['ema_test_acc']:.2f}"}

    def networks(self, trainer: Trainer, epoch: int) -> dict[str, nn.Module]:
        assert self.average is not None
        names = ["student_ema_latest", *(["student_ema_best"] if self.best_epoch == epoch else [])]
        return dict.fromkeys(names, self.average)

    def state(self, trainer: Trainer) -> dict[str, Any]:
        assert self.average is not None
        names = ("updates", "best_acc", "best_epoch", "best_score")
        facts = {name: getattr(self, name) for name in names}
        return {"ema": {"model": self.average.state_dict(), **facts}}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        if "ema" in state:  # not in checkpoints of the original: those start an average
            facts = {"best_score": state["ema"]["best_acc"], **state["ema"]}
            self._begin(trainer).load_state_dict(facts.pop("model"))
            vars(self).update(facts)

    def summarize(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        assert self.average is not None
        last = trainer.history[-1].get("ema_test_acc") if trainer.history else None
        summary = {
            "ema_last_acc": last,
            "ema_best_acc": self.best_acc,
            "ema_best_epoch": self.best_epoch,
        }
        if data.test is not None:
            student, file = self.average, trainer.log_path / "student_ema_best"
            summary |= last_and_best(student, file, data.test, "ema_", Vanilla(student))
        return summary
