"""Mean and deviation of maps, compared channel by channel, and layers that match the channels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mdistiller.distillers._common import require_one_of

EPS = 1e-5


def wkd_feature_loss(student: Tensor, teacher: Tensor, grid: int, ratio: float) -> Tensor:
    """F, a scalar, of maps [N, C, ., .] with the same channels; they may differ in size."""
    pairs = zip(_cells(student, grid), _cells(teacher, grid), strict=True)
    total = sum(
        ratio * (mean_s - mean_t).square().sum() + (std_s - std_t).square().sum()
        for (mean_s, std_s), (mean_t, std_t) in (map(_moments, pair) for pair in pairs)
    )
    return total / (len(student) * grid**2)  # type: ignore[return-value]


def _cells(x: Tensor, grid: int) -> Iterator[Tensor]:
    """The parts of maps [N, C, H, W], [..., pixels]: one tensor of all that are equally large.

    Where a side is no multiple of `grid`, cells overlap as those of adaptive pooling do.
    """
    (height, width), parts = x.shape[2:], range(grid)
    if height % grid == 0 and width % grid == 0:
        yield x.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).transpose(3, 4).flatten(4)
        return
    rows, columns = (
        [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in parts]
        for side in (height, width)
    )
    yield from (x[:, :, row, column].flatten(2) for row in rows for column in columns)


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the last dimension."""
    var, mean = torch.var_mean(pixels, dim=-1, correction=min(1, pixels.shape[-1] - 1))
    return mean, (var + EPS).sqrt()


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
