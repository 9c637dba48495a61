"""The training loops that the step benchmark compares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from benchmarks.step_data import Short, classic_loader, endless
from benchmarks.textbook import textbook_loss
from mdistiller.dataset import Data
from mdistiller.distillers import Distiller, Output
from mdistiller.engine.cfg import Config
from mdistiller.engine.optim import build_optimizer
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import accuracy
from mdistiller.networks.compiling import compile_networks
from mdistiller.run.build import channels_last_input
from mdistiller.runtime import autocast


class Ours:
    """The config's trainer itself: whole epochs of `steps` steps, without hooks."""

    def __init__(self, cfg: Config, distiller: Distiller, data: Data, steps: int):
        self.loader = Short(data.train, steps)
        compile_networks(distiller, cfg.SOLVER.COMPILE)
        self.trainer: BaseTrainer = trainer_dict[cfg.SOLVER.TRAINER](
            "benchmark", distiller, self.loader, data.val, cfg
        )
        self.trainer.hooks = []

    def run(self) -> None:
        self.trainer.train_epoch(self.trainer.epoch + 1)

    def read(self) -> None:
        """The batches of a round, and no more."""
        for _ in self.loader:
            pass


class Bare:
    """The same networks, loss and optimizer in a plain loop over one ready batch.

    The teacher is run as ours is, folded or not; nothing is measured, checked or shown.
    """

    def __init__(self, cfg: Config, distiller: Distiller, data: Data, steps: int):
        self.cfg, self.distiller, self.steps = cfg, distiller.train(), steps
        self.device = next(distiller.parameters()).device
        self.optimizer = build_optimizer(distiller.param_groups(), cfg.SOLVER)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.SOLVER.AMP == "fp16")
        self.batch = next(iter(data.train))

    def run(self) -> None:
        for _ in range(self.steps):
            self.step(self.batch)

    def step(self, batch: Any, epoch: int = 1) -> Tensor:
        """One step on (image, target, index); the loss."""
        with autocast(self.device, self.cfg.SOLVER.AMP):
            _, loss = plain_forward(self.distiller, batch, epoch, self.distiller.distill)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def plain_forward(
    distiller: Distiller, batch: Any, epoch: int, distill: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Student logits, and the sum of cross-entropy and `distill`.

    A method with a training step of its own takes that instead.
    """
    image, target, index = batch
    if type(distiller).forward_train is not Distiller.forward_train:
        images = {"image": image}
        if isinstance(image, (list, tuple)):
            images = dict(zip(("image_weak", "image_strong"), image, strict=True))
        logits, terms = distiller.forward_train(**images, target=target, index=index, epoch=epoch)
        return logits, torch.stack(list(terms.values())).sum()
    logits, features = distiller.student(image)
    with torch.no_grad():
        teacher_net: Any = distiller.frozen or distiller.teacher
        other, other_features = teacher_net(image)
    with torch.autocast(logits.device.type, enabled=False):
        student = Output(logits.float(), features)
        teacher = Output(other.float(), other_features)
        loss = distiller.ce_loss_weight * F.cross_entropy(
            student.logits, target, label_smoothing=distiller.label_smoothing
        )
        student, teacher = distiller.standardized(student), distiller.standardized(teacher)
        return student.logits, loss + distill(student, teacher, target, epoch=epoch, index=index)


class Classic:
    """The usual script: images through PIL one by one, textbook losses, numbers read every step.

    Always in full precision and in NCHW; the teacher is run as it is.

    Attributes:
        textbook: whether the method's loss is the textbook form, else it is ours.
    """

    def __init__(self, cfg: Config, distiller: Distiller, data: Data, steps: int, workers: int):
        distiller.frozen = None
        undo_channels_last(distiller)
        self.distiller, self.steps = distiller.train(), steps
        self.device = next(distiller.parameters()).device
        self.optimizer = build_optimizer(distiller.param_groups(), cfg.SOLVER)
        distill = textbook_loss(cfg, distiller, data.train.dataset.targets)
        self.textbook = distill is not None
        self.distill = distill or distiller.distill
        self.batches = endless(classic_loader(cfg, data, workers))
        self.seen: list[tuple[float, ...]] = []

    def run(self) -> None:
        for batch in self.on_device():
            self.step(batch)

    def read(self) -> None:
        """The batches of a round, and no more."""
        for _ in self.on_device():
            pass

    def on_device(self) -> Iterator[Any]:
        for batch in itertools.islice(self.batches, self.steps):
            yield [item.to(self.device, non_blocking=True) for item in batch]

    def step(self, batch: Any, epoch: int = 1) -> float:
        """One step on (image, target, index); the loss."""
        logits, loss = plain_forward(self.distiller, batch, epoch, self.distill)
        top1, top5 = accuracy(logits.detach(), batch[1], (1, 5))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen = [*self.seen[-99:], (loss.item(), top1.item(), top5.item())]
        return self.seen[-1][0]


def undo_channels_last(distiller: Distiller) -> None:
    """Undo `use_channels_last`."""
    convert_conv2d_weight_memory_format(distiller, torch.contiguous_format)  # type: ignore[arg-type]
    for net in (distiller.student, distiller.teacher):
        if isinstance(net, nn.Module):
            hooks = net._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is channels_last_input]:
                del hooks[key]
