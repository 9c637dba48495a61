"""Tensor arithmetic that losses share, safe for any finite input, and cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Target of samples without a label; losses that need labels leave them out."""


def full_precision(value: Any) -> Any:
    """`value` with half-precision tensors cast to float32; lists and tuples element by element.

    Losses are computed on the result: 1e-8 is zero in fp16, and bf16 has 3 digits.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, (list, tuple)):
        return [full_precision(item) for item in value]
    return value


def mean_square_error(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or "sum") of squared differences; its gradient has the memory layout of `student`.

    The gradient of `F.mse_loss` is always in NCHW: a batch norm in channels_last then takes 15
    times as long for its backward pass on a CPU.
    """
    if student.is_contiguous():
        return F.mse_loss(student, teacher, reduction=reduction)
    total = (student - teacher).square().sum()  # the gradient of mean() is in NCHW as well
    return total if reduction == "sum" else total / student.numel()


def scale_logits(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`logits / temperature` in full precision, within ±1e30.

    Beyond that bound, differences of float32 numbers overflow. A temperature may be a tensor with
    one value, or with one for every sample, [N, 1].
    """
    logits = full_precision(logits)
    if isinstance(temperature, Tensor) or temperature != 1:
        logits = logits / temperature
    # not clamp, whose backward takes several passes
    return F.hardtanh(logits, -1e30, 1e30)


def divergence(log_q: Tensor, log_p: Tensor, dim: int | None = -1) -> Tensor:
    """KL(q || p) from log-probabilities, summed over `dim`: the classes' or, with None, all."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=dim)


def weighted_divergence(log_q: Tensor, log_p: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n KL(q_n || p_n), a scalar, from log-probabilities [N, C] and weights [N]."""
    shares = log_q.softmax(dim=1) * weights[:, None]  # faster than exp, which tiny values slow down
    return torch.dot(shares.flatten(), (log_q - log_p).flatten())


def cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the labelled samples; 0 without labelled samples.

    The mean divides by the number of samples, not by the sum of their weights: so it does not
    depend on how a batch is divided between processes.

    Args:
        logits: [N, C].
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] class probabilities.
        smoothing: part of the probability that is spread evenly over all classes.
        weights: of the samples of each class, [C]; None: 1.
    """
    logits = scale_logits(logits, 1.0)
    soft = target.is_floating_point()
    labelled = len(target) if soft else (target != IGNORE_INDEX).sum().clamp(min=1)
    if weights is not None and smoothing > 0:
        # torch weights each class of the evenly spread part by itself, whatever the sample's class:
        # the large weights of rare classes then outweigh a frequent label.
        if soft:
            of_samples = (weights * target).sum(dim=1)
        else:
            of_samples = weights[target.clamp(min=0)] * (target != IGNORE_INDEX)
        even = -(of_samples * logits.log_softmax(dim=1).mean(dim=1)).sum() / labelled
        return torch.lerp(cross_entropy(logits, target, 0.0, weights), even, smoothing)
    total = F.cross_entropy(
        logits,
        target,
        weights,
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        label_smoothing=smoothing,
    )
    return total / labelled


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` with vectors of length 1 along `dim`; those shorter than 1e-12 become 0.

    The usual division by max(length, 1e-12) gives a zero vector a gradient of 1e12; here it is 0.
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length <= 1e-12, math.inf)


def centre(x: Tensor, dim: int) -> Tensor:
    """`x` minus its mean along `dim`; 0, without gradient, where `x` is constant up to rounding.

    What is left there is noise, which a division by its own length would blow up.
    """
    centred = x - x.mean(dim=dim, keepdim=True)
    largest, spread = (v.detach().abs().amax(dim=dim, keepdim=True) for v in (x, centred))
    return centred.masked_fill(spread <= 8 * torch.finfo(x.dtype).eps * largest, 0.0)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (grads[0] + grads[0].T) @ rows


def gram(rows: Tensor) -> Tensor:
    """Scalar products of all rows [N, D] with each other, [N, N].

    `rows @ rows.T`, but the backward pass needs one product instead of two.
    """
    product: Tensor = _Gram.apply(rows)
    return product
