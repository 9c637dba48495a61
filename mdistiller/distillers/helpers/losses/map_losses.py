"""Losses and modules on feature maps that classification and detection share: FitNet's, ReviewKD's.

FitNet.py and ReviewKD.py give them under their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers.helpers.features.connectors import pool_to
from mdistiller.distillers.helpers.losses.numerics import full_precision, mean_square_error


def fitnet_loss(hint: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, a scalar.

    Args:
        hint: the regressed student map, [N, C, H, W].
        teacher: [N, C, H', W']; averaged to H x W first where that differs.
    """
    hint = full_precision(hint)
    return mean_square_error(hint, pool_to(full_precision(teacher), hint))


def hcl_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss, summed over pairs of maps [N, C, H, W] of equal shape."""
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(map(full_precision, student), map(full_precision, teacher), strict=True):
        weight, weights, loss = 1.0, 1.0, mean_square_error(s, t)
        for side in (4, 2, 1):
            if side < s.shape[2]:
                weight /= 2
                weights += weight
                s_mean, t_mean = (F.adaptive_avg_pool2d(x, side) for x in (s, t))
                loss = loss + weight * mean_square_error(s_mean, t_mean)
        total = total + loss / weights
    return total


class ABF(nn.Module):
    """Attention-based fusion of a map with the residual of the deeper levels.

    Args:
        fuse: False for the deepest level, which has no residual.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.att_conv = (
            nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        )
        for part in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(cast(nn.Conv2d, part[0]).weight, a=1)

    def forward(
        self, feature: Tensor, residual: Tensor | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The output [N, out, *size], and the residual [N, mid, *size] for the next level."""
        x = self.conv1(feature)
        if self.att_conv is not None and residual is not None:
            residual = F.interpolate(residual, x.shape[2:], mode="nearest")
            gates = self.att_conv(torch.cat([x, residual], dim=1))
            x = x * gates[:, :1] + residual * gates[:, 1:]
        if x.shape[2:] != tuple(size):
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.conv2(x), x


def review(
    blocks: Iterable[nn.Module], features: Iterable[Tensor], sizes: Iterable[Sequence[int]]
) -> list[Tensor]:
    """Outputs of ABFs, shallow to deep; blocks, student maps, output sizes come deep to shallow."""
    outputs, residual = [], None
    for block, feature, size in zip(blocks, features, sizes, strict=True):
        out, residual = block(feature, residual, size)
        outputs.append(out)
    return outputs[::-1]
