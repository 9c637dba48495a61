"""Train a detector with the engine's trainer, in epochs of SOLVER.EVAL_PERIOD iterations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
)

from mdistiller.config.tasks import TASKS
from mdistiller.detection.batches import Batch, TrainBatches
from mdistiller.detection.coco.evaluate import evaluate_detector
from mdistiller.engine.hooks import Hook, Trainer
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import UserError
from mdistiller.runtime import world_size

SCORE = TASKS["detection"].score.removeprefix("test_")
"""Selects the best epoch."""


class IterationEpochs:
    """An endless stream of batches, cut into epochs of a number of iterations.

    Each batch is yielded once; the position in the stream is part of :meth:`state_dict`.

    Args:
        batches: the stream.
        period: micro-batches of an epoch; the last epoch may be shorter.
        total: micro-batches of a run.

    Attributes:
        epoch: the current one, from 1.
        done: its micro-batches so far.
    """

    def __init__(self, batches: TrainBatches, period: int, total: int):
        self.batches, self.period, self.total = batches, period, total
        self.epoch, self.done = 0, 0
        self._flow: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Micro-batches of the current epoch."""
        before = max(self.epoch - 1, 0) * self.period
        return min(self.period, self.total - before)

    @property
    def dataset(self) -> range:
        """A range as long as the epoch's number of images over all processes."""
        return range(len(self) * self.batches.batch_size * world_size())

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __iter__(self) -> Iterator[Batch]:
        if self._flow is None:
            self._flow = iter(self.batches)
        while self.done < len(self):
            batch = next(self._flow)
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same in all processes."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "period": self.period,
            "total": self.total,
            "stream": self.batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch before `state` was taken.

        Raises:
            UserError: the epochs had another length, so the position of `state` has no meaning.
        """
        short = state["epoch"] * state["period"] > state["total"] != self.total
        if state["period"] != self.period or short:
            what = "ended within an epoch" if short else f"had epochs of {state['period']}"
            raise UserError(
                f"the run {what} micro-batches, of {state['total']} in all, now it is "
                f"{self.period} of {self.total}: keep SOLVER.EVAL_PERIOD, ACCUMULATE"
                f"{' and MAX_ITER' if short else ''} as they were, or start a new run"
            )
        self.epoch, self.done, self._flow = state["epoch"], state["done"], None
        self.batches.load_state_dict(state["stream"])


class LoaderState(Hook):
    """Saves the loader's position in the stream of batches with each checkpoint."""

    def state(self, trainer: Trainer) -> dict[str, Any]:
        return {"batches": trainer.train_loader.state_dict()}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        trainer.train_loader.load_state_dict(state["batches"])


def build_schedule(optimizer: Optimizer, solver: Any) -> LRScheduler:
    """The learning rate schedule, stepped before every iteration but the first.

    A step s of STEPS is the last iteration (from 1) at the old rate. The warm-up scales the
    schedule and does not shift it.
    """
    parts: list[LRScheduler] = []
    if solver.WARMUP_ITERS:
        parts.append(LinearLR(optimizer, solver.WARMUP_FACTOR, total_iters=solver.WARMUP_ITERS))
    if solver.SCHEDULE == "multistep":
        parts.append(MultiStepLR(optimizer, list(solver.STEPS), gamma=solver.LR_DECAY_RATE))
    elif solver.SCHEDULE == "cosine":
        parts.append(CosineAnnealingLR(optimizer, solver.MAX_ITER))
    else:
        parts.append(ConstantLR(optimizer, factor=1.0))
    return ChainedScheduler(parts, optimizer)


_STEP_KEYS = (
    *("LR", "SCHEDULE", "STEPS", "LR_DECAY_RATE", "WARMUP_ITERS", "WARMUP_FACTOR", "WEIGHT_DECAY"),
    *("WEIGHT_DECAY_NORM", "MOMENTUM", "NESTEROV", "SKIP_NONFINITE"),
)


@trainer_dict.register("detection")
class DetectionTrainer(BaseTrainer):
    """Trains a detector by the sum of its own losses and the methods' terms.

    The learning rate changes after every iteration. `best_acc` is the box AP in percent.
    """

    selects: str = f"test_{SCORE}"
    own_steps: ClassVar[bool] = False
    own_inputs: ClassVar[bool] = False

    def make_hooks(self, cfg: Any) -> list[Hook]:
        return [LoaderState(), *super().make_hooks(cfg)]

    def init_scheduler(self, cfg: Any) -> LRScheduler:
        return build_schedule(self.optimizer, cfg.SOLVER)

    def end_epoch(self, train_loss: float) -> None:
        """Does nothing: the schedule counts iterations."""

    def step_settings(self) -> dict[str, Any]:
        solver = self.cfg.SOLVER
        keys = [*_STEP_KEYS, *(["MAX_ITER"] if solver.SCHEDULE == "cosine" else [])]
        return {key: solver[key] for key in keys}

    def restart_schedule(self, losses: Sequence[float]) -> None:
        super().restart_schedule(losses)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(-(-self.global_step // self.accumulate) - 1):
                self.scheduler.step()

    @property
    def global_step(self) -> int:
        return self.epoch * self.train_loader.period + self.step

    def optimize(self, losses: dict[str, Tensor]) -> None:
        if self.begins_step and self.global_step > 1:
            self.scheduler.step()
        super().optimize(losses)

    def batch_inputs(self, data: Batch, epoch: int) -> dict[str, Any]:  # type: ignore[override]
        images, targets = data
        index = torch.tensor([target["image_id"] for target in targets])
        return {"images": images, "targets": targets, "index": index, "epoch": epoch}

    def measure(self, output: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
        return {}, len(inputs["images"])

    def train_numbers(self, means: dict[str, float]) -> dict[str, float]:
        loss = means.pop("losses", 0.0)
        return {"train_loss": loss, **{f"train_{name}": value for name, value in means.items()}}

    def evaluate(self) -> dict[str, float]:
        backend = self.cfg.DETECTION.EVALUATOR
        numbers = evaluate_detector(self.model.student, self.val_loader, self.device, backend)
        return {f"test_{name}": value for name, value in numbers.items()}

    def columns(self, record: dict[str, Any]) -> dict[str, str]:
        done = min(self.epoch * self.cfg.SOLVER.EVAL_PERIOD, self.cfg.SOLVER.MAX_ITER)
        cells = {
            "iter": str(done),
            "AP": self.marked(f"{record[self.selects]:.2f}"),
            "AP50": f"{record['test_bbox/AP50']:.2f}",
        }
        if "test_segm/AP" in record:
            cells["mask AP"] = f"{record['test_segm/AP']:.2f}"
        return cells
