"""What a logit method measures between teacher and student: the config key DIVERGENCE.

With p the teacher's and q the student's probabilities:

    kl            KL(p || q)
    reverse_kl    KL(q || p)
    ab(a, b)      -1/(a b) sum_c [p^a q^b - a/(a + b) p^(a + b) - b/(a + b) q^(a + b)]

The last one is ABKD's. Wang et al.: ABKD: Pursuing a Proper Allocation of the Probability
Mass in Knowledge Distillation via alpha-beta-Divergence, ICML 2025, arXiv 2505.04560.
ab(1, 0) is kl, ab(0, 1) reverse_kl, ab(0, 0) half the sum of squared differences of logarithms;
where a, b or a + b is 0 the formula has a limit of its own.

The methods keep their factor T^2, which the authors' code leaves out: their weight is divided by
T^2 in a config here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor

from mdistiller.distillers.helpers.losses.numerics import divergence
from mdistiller.registry import UserError

Divergence = Callable[..., Tensor]
"""(teacher's log-probabilities, student's, dim) -> the sum over `dim`, or with None over all."""

SMALLEST = 0.01
"""Below it (0 apart) a, b or a + b divides a difference that float32 has rounded away."""
_LARGEST = 60.0  # exponents end here where they can be positive: e^60 is far from overflow


def reverse_divergence(log_p: Tensor, log_q: Tensor, dim: int | None = -1) -> Tensor:
    """KL(q || p) for the same arguments as :func:`divergence`'s KL(p || q)."""
    return divergence(log_q, log_p, dim=dim)


def ab_divergence(
    log_p: Tensor, log_q: Tensor, alpha: float, beta: float, dim: int | None = -1
) -> Tensor:
    """The alpha-beta divergence from log-probabilities.

    With alpha, beta >= 0 and one of them above 0 it is finite whatever the logits are. Otherwise
    it grows without bound where probabilities vanish: those below exp(-60 / m), m the largest of
    |alpha|, |beta|, |alpha + beta| and 1, are then raised to that, and give no gradient.

    Args:
        log_p, log_q: of teacher and student, the same shape.
        dim: the classes' dimension; None: sum over everything.
    """
    both = alpha + beta
    if min(alpha, beta) < 0 or both <= 0:
        low = -_LARGEST / max(abs(alpha), abs(beta), abs(both), 1.0)
        log_p, log_q = log_p.clamp(min=low), log_q.clamp(min=low)
    if alpha == beta == 0:
        return (log_p - log_q).square().sum(dim=dim) / 2
    if alpha == 0:
        return _limit(log_q, log_p, beta, dim)
    if beta == 0:
        return _limit(log_p, log_q, alpha, dim)
    if both == 0:
        odds = alpha * (log_q - log_p)
        return (odds + torch.expm1(-odds)).sum(dim=dim) / alpha**2
    mixed = (alpha * log_p + beta * log_q).exp()
    plain = (alpha / both) * (both * log_p).exp() + (beta / both) * (both * log_q).exp()
    return (plain - mixed).sum(dim=dim) / (alpha * beta)


def _limit(log_p: Tensor, log_q: Tensor, power: float, dim: int | None) -> Tensor:
    """Of the divergence at (power, 0); the one at (0, power) has p and q exchanged."""
    p, q = (power * log_p).exp(), (power * log_q).exp()
    return (p * (power * (log_p - log_q)) - p + q).sum(dim=dim) / power**2


def read_divergence(key: str, text: str) -> Divergence:
    """The divergence that a config names.

    Raises:
        UserError: it names none, or one that float32 cannot tell from its limit.
    """
    words = "".join(str(text).split()).lower()
    if words == "kl":
        return divergence
    if words == "reverse_kl":
        return reverse_divergence
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
    match = re.fullmatch(rf"ab\({number},{number}\)", words)
    if match is None:
        raise UserError(f"{key} must be kl, reverse_kl or ab(ALPHA, BETA), got {text!r}")
    alpha, beta = map(float, match.groups())
    for name, value in (("ALPHA", alpha), ("BETA", beta), ("ALPHA + BETA", alpha + beta)):
        if 0 < abs(value) < SMALLEST:
            raise UserError(
                f"{key} {text!r}: {name} is {value:g}, too close to 0 for float32; "
                f"set it to 0, or to at least {SMALLEST} in size"
            )
    return functools.partial(ab_divergence, alpha=alpha, beta=beta)
