"""Layers and pooling that bring a student's map to the shape of a teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def pool_to(x: Tensor, like: Tensor) -> Tensor:
    """`x` [N, C, H, W] averaged to the height and width of `like`; itself where they agree."""
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(x, (height, width))


class ConvReg(nn.Module):
    """Convolution, batch norm and ReLU that bring a student's map to the shape of a teacher's.

    Twice the teacher's size: 3x3, stride 2. Half of it: transposed 4x4, stride 2. Not smaller on
    either side: a kernel that just fits, without padding. Otherwise 1x1; the map keeps its size,
    and the teacher's is to be pooled to it.

    Args:
        s_shape, t_shape: [N, C, H, W] of student and teacher.
        use_relu: end with a ReLU.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True):
        super().__init__()
        (_, s_width, *s_size), (_, t_width, *t_size) = s_shape, t_shape
        self.conv: nn.Module
        if s_size == [2 * side for side in t_size]:
            self.conv = nn.Conv2d(s_width, t_width, 3, stride=2, padding=1)
        elif [2 * side for side in s_size] == t_size:
            self.conv = nn.ConvTranspose2d(s_width, t_width, 4, stride=2, padding=1)
        else:
            height, width = (1 + s - t for s, t in zip(s_size, t_size, strict=True))
            fits = min(height, width) >= 1
            self.conv = nn.Conv2d(s_width, t_width, (height, width) if fits else (1, 1))
        self.bn = nn.BatchNorm2d(t_width)
        self.relu = nn.ReLU()
        self.use_relu = use_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.relu(x) if self.use_relu else x
