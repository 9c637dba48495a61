"""Quantisation-aware training: the last epochs in weights and activations of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers import Vanilla
from mdistiller.engine.hooks import Hook, Record, Trainer
from mdistiller.engine.utils import validate
from mdistiller.registry import UserError
from mdistiller.runtime import world_size


class Rounding:
    """The rounding of a layer's input to 256 values, and of its weight to 255 per output channel.

    Attributes:
        range: the lowest and the highest input, [2]; zero is always inside.
        active: whether the layer rounds.
        observing: whether inputs widen the range.
    """

    def __init__(self, range: Tensor):
        self.range = range
        self.active = self.observing = False

    def input(self, x: Tensor) -> Tensor:
        """`x` rounded, with the gradient of clipping to the range."""
        x = x.float()
        if self.observing:
            low, high = torch.aminmax(x.detach())
            low, high = torch.minimum(self.range[0], low), torch.maximum(self.range[1], high)
            self.range.copy_(torch.stack([low, high]))
        scale = ((self.range[1] - self.range[0]) / 255).clamp(min=1e-12)
        zero = (-self.range[0] / scale).round().clamp(0, 255).int()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)

    @staticmethod
    def weight(weight: Tensor) -> Tensor:
        """The weight rounded symmetrically, as it would be after folding a batch norm into it."""
        scale = (weight.detach().flatten(1).abs().amax(1) / 127).clamp(min=1e-12)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class RoundedConv2d(nn.Conv2d):
    """A convolution that rounds input and weight while its `rounding` is active."""

    rounding: Rounding

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounding.active:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 has not all steps of 8 bits
            rounded, weight = self.rounding.input(x), self.rounding.weight(self.weight)
            return self._conv_forward(rounded, weight, self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer that rounds input and weight while its `rounding` is active."""

    rounding: Rounding

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounding.active:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.rounding.input(x), self.rounding.weight(self.weight), self.bias)


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: RoundedConv2d,
    nn.Linear: RoundedLinear,
}


class QuantizeStudent(Hook):
    """Rounds the student's inputs and weights in the last SOLVER.QAT_EPOCHS epochs.

    As in Jacob et al., CVPR 2018: the forward pass rounds, the gradient is that of clipping; ranges
    of inputs are observed in the first of these epochs, then stay. Batch norms go on as before:
    weights are rounded per output channel, so folding a norm into them rounds alike. The student
    keeps its float weights and their names; evaluations are of these, and the epoch's record has
    `int8_test_acc`, that of the rounded student.

    Attributes:
        roundings: by name of the layer; empty before.
    """

    def __init__(self) -> None:
        self.roundings: dict[str, Rounding] = {}
        self.saved: Mapping[str, Tensor] = {}

    def before_train(self, trainer: Trainer) -> None:
        if world_size() > 1:
            raise UserError(
                "SOLVER.QAT_EPOCHS observes ranges in one process; start without torchrun, or set "
                "it to 0"
            )

    def before_epoch(self, trainer: Trainer, saved: Mapping[str, Any]) -> None:
        epoch = trainer.epoch + 1
        first = trainer.cfg.SOLVER.EPOCHS - trainer.cfg.SOLVER.QAT_EPOCHS + 1
        if trainer.stage or epoch < first:
            return
        observing = epoch == first
        if not self.roundings:
            self._attach(trainer)
            observing |= not self.saved  # the key is newer than the first of these epochs
        self._switch(active=True, observing=observing)

    def _attach(self, trainer: Trainer) -> None:
        for name, layer in trainer.model.student.named_modules():
            kind = _ROUNDED.get(type(layer))
            if kind is not None:
                saved = self.saved.get(name, torch.zeros(2))
                rounding = Rounding(saved.to(trainer.device, torch.float32).clone())
                layer.__class__ = kind
                layer.rounding = rounding  # type: ignore[assignment]
                self.roundings[name] = rounding
        if not self.roundings:
            raise UserError(
                f"SOLVER.QAT_EPOCHS: {trainer.cfg.DISTILLER.STUDENT} has no nn.Conv2d or nn.Linear "
                "to quantise; set it to 0"
            )

    def _switch(self, active: bool, observing: bool) -> None:
        for rounding in self.roundings.values():
            rounding.active, rounding.observing = active, observing

    def after_epoch(self, trainer: Trainer, epoch: int, record: Record) -> None:
        if self.roundings:
            self._switch(active=True, observing=False)
            top1, _, loss = validate(trainer.val_loader, Vanilla(trainer.model.student))
            record.update(int8_test_acc=top1, int8_test_loss=loss)
            self._switch(active=False, observing=False)

    def state(self, trainer: Trainer) -> dict[str, Any]:
        ranges = {name: rounding.range.cpu() for name, rounding in self.roundings.items()}
        return {"int8_ranges": ranges} if ranges else {}

    def load_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self.saved = state.get("int8_ranges", {})
