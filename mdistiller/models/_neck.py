"""Layers between a network's last map and its classifier, for a student that gets another head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Neck(nn.Sequential):
    """1x1, 3x3 and 1x1 convolution without bias, a batch norm and ReLU after each.

    Its state dict suffices to build it again, see :func:`read_neck`.

    Args:
        inputs, hidden, outputs: channels before, between and after the convolutions.
        size: (height, width) to which a larger map is averaged first.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, size: tuple[int, int]):
        layers: list[nn.Module] = []
        for source, target, kernel in (
            (inputs, hidden, 1),
            (hidden, hidden, 3),
            (hidden, outputs, 1),
        ):
            layers.append(nn.Conv2d(source, target, kernel, padding=kernel // 2, bias=False))
            layers += [nn.BatchNorm2d(target), nn.ReLU()]
        super().__init__(*layers)
        self.inputs, self.outputs, self.size = inputs, outputs, size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > self.size[0]:
            x = F.adaptive_avg_pool2d(x, self.size)
        return super().forward(x)

    def get_extra_state(self) -> Tensor:
        """The size: part of the state dict."""
        return torch.tensor(self.size)

    def set_extra_state(self, state: Tensor) -> None:
        self.size = (int(state[0]), int(state[1]))


def read_neck(state: Mapping[str, Tensor], prefix: str = "neck.") -> Neck | None:
    """A fresh neck of the shape that a state dict has under `prefix`; None if it has none."""
    names = ("0.weight", "6.weight", "_extra_state")
    if any(prefix + name not in state for name in names):
        return None
    first, last, size = (state[prefix + name] for name in names)
    if first.ndim != 4 or last.ndim != 4 or size.numel() != 2:
        return None
    return Neck(first.shape[1], len(first), len(last), (int(size[0]), int(size[1])))


def with_inputs(layer: nn.Module | None, inputs: int) -> nn.Linear | nn.Conv2d:
    """A fresh classifier like `layer` (linear or 1x1 convolution) with `inputs` channels."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    new: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        new = nn.Linear(inputs, layer.out_features)
    else:
        new = nn.Conv2d(inputs, layer.out_channels, 1)
    return new.to(layer.weight)
