"""Input that makes other implementations divide by zero or overflow."""

import torch
import torch.nn.functional as F


def hostile_logits():
    """Logits by kind, [5, 10] each."""
    row = torch.arange(10.0)
    one_hot = F.one_hot(torch.tensor(3), 10).float()
    return {
        "zeros": torch.zeros(5, 10),
        "constant": torch.full((5, 10), 7.0),
        "duplicates": row.repeat(5, 1),
        "target far above": 1e4 * one_hot.repeat(5, 1),
        "target far below": -1e4 * one_hot.repeat(5, 1),
        "largest": 3.4e38 * (2.0 * (row % 2) - 1).repeat(5, 1),
        "huge": 1e30 * torch.randn(5, 10, generator=torch.Generator().manual_seed(0)),
    }


KINDS = [
    "random", "zeros", "constant", "duplicate rows", "equal rows", "one zero row", "zero channel",
    "1e4-fold", "equal singular values",
]  # fmt: skip
"""Of :func:`rough_features`; the last is of maps only."""


def rough_features(kind, shape, batch, seed):
    """Features [batch, *shape] of a kind."""
    noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    if kind == "one zero row":
        noise[0] = 0
    if kind == "zero channel":
        noise[:, 0] = 0
    if kind == "equal singular values":
        side = shape[-1]
        return torch.eye(side).expand(batch, *shape[:-2], side, side).contiguous()
    return {
        "zeros": torch.zeros_like(noise),
        "constant": torch.full_like(noise, 3.0),
        "duplicate rows": noise[: (batch + 1) // 2].repeat(2, *[1] * len(shape))[:batch],
        "equal rows": noise[:1].expand_as(noise).contiguous(),
        "1e4-fold": 1e4 * noise,
    }.get(kind, noise)
