"""Pieces that several methods share: precision, cross-entropy, warm-up, checks of settings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.registry import UserError

IGNORE_INDEX = -100
"""Target value of samples that carry no label; losses that need labels leave them out."""


def full_precision(value: Any) -> Any:
    """`value` with half-precision tensors cast to float32; lists and tuples element by element.

    Losses are computed on the result: 1e-8 is zero in fp16, and bf16 has 3 digits.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, (list, tuple)):
        return [full_precision(item) for item in value]
    return value


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled samples; 0 if there are none.

    Args:
        logits: [N, C].
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] class probabilities.
    """
    logits = full_precision(logits)
    if target.is_floating_point():
        return F.cross_entropy(logits, target)
    total = F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORE_INDEX)
    return total / (target != IGNORE_INDEX).sum().clamp(min=1)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` with vectors of length 1 along `dim`; those shorter than 1e-12 become 0.

    The usual division by max(length, 1e-12) gives a zero vector a gradient of 1e12; here it is 0.
    """
    squares = x.square().sum(dim=dim, keepdim=True)
    is_zero = squares <= 1e-24
    return x * squares.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)


def warmup_factor(epoch: int, warmup: int) -> float:
    """Linear warm-up of a loss weight: min(epoch / warmup, 1), epochs counted from 1."""
    return min(epoch / warmup, 1.0) if warmup > 0 else 1.0


def require_positive(key: str, value: float) -> float:
    """`value` if it is above zero; the error names the config key."""
    if not value > 0:
        raise UserError(f"{key} must be positive, got {value}")
    return value
