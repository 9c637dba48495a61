"""Mean and deviation of maps, compared channel by channel, and layers that match the channels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers.helpers.training.settings import require_one_of

EPS = 1e-5


def wkd_feature_loss(student: Tensor, teacher: Tensor, grid: int, ratio: float) -> Tensor:
    """F, a scalar, of maps [N, C, ., .] with the same channels; they may differ in size."""
    (mean_s, std_s), (mean_t, std_t) = (grid_moments(x, grid) for x in (student, teacher))
    means, deviations = (mean_s - mean_t).square().sum(), (std_s - std_t).square().sum()
    return (ratio * means + deviations) / (len(student) * grid**2)


def grid_moments(x: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + EPS) of maps [N, C, H, W] by cell: [N, C, grid, grid] both.

    If a side is not a multiple of `grid`, cells overlap as those of adaptive pooling do. The
    variance of a single pixel is 0.
    """
    if x.shape[2] % grid or x.shape[3] % grid:
        moments = [torch.var_mean(c, (2, 3), correction=_spare(c)) for c in _cells(x, grid)]
        var, mean = (
            torch.stack(part, 2).unflatten(2, (grid, -1)) for part in zip(*moments, strict=True)
        )
        return mean, (var + EPS).sqrt()
    side = x.shape[2] // grid, x.shape[3] // grid
    mean = F.avg_pool2d(x, side)
    off = x - mean.repeat_interleave(side[0], 2).repeat_interleave(side[1], 3)
    count = side[0] * side[1]
    var = F.avg_pool2d(off.square(), side) * (count / max(count - 1, 1))
    return mean, (var + EPS).sqrt()


def _cells(x: Tensor, grid: int) -> Iterator[Tensor]:
    """The cells, row by row."""
    rows, columns = (
        [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
        for side in x.shape[2:]
    )
    yield from (x[:, :, row, column] for row in rows for column in columns)


def _spare(cell: Tensor) -> int:
    """What is taken off the number of pixels of a cell to divide by."""
    return int(cell[0, 0].numel() > 1)


def make_projector(kind: str, inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Brings a student's map to the teacher's channels: WKD.PROJECTOR."""
    plans = {
        "conv1x1": [(inputs, outputs, 1)],
        "bottleneck": [(inputs, width, 1), (width, width, 3), (width, outputs, 1)],
    }
    layers: list[nn.Module] = []
    for before, after, side in plans[require_one_of("WKD.PROJECTOR", kind, list(plans))]:
        layers += [
            nn.Conv2d(before, after, side, padding=side // 2, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
