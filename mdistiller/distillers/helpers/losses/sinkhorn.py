"""Optimal transport with entropy: Sinkhorn's rounds, the plan's cost, gradient through the rounds.

To move the masses Q onto P at the costs D, with K = exp(-D / lambda), from a constant u:

    v = Q / (K^T u),  u = P / (K v),  and again
    plan_ij = u_i K_ij v_j,  cost = sum_ij plan_ij D_ij = sum_i P_i ((K D) v)_i / (K v)_i

(K D elementwise). All rows share one K, so a round is two matrix products [N, C] x [C, C]; classes
that a row leaves out have mass 0 and take no part. Where D / lambda stays below `DIRECT`, no entry
of K is so small that a sum could vanish, whatever P and Q are, since sum u K v is always 1. Beyond,
the same rounds run on logarithms, some rows at a time.

The published code adds 1e-8 to the denominators; these forms need no such number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DIRECT = 30.0
"""Largest D / lambda for which K itself is used: e^-30 is far from the end of float32."""
CHUNK = 2**24
"""Numbers that a round on logarithms has in memory at once: rows x C x C."""


def transport_cost(
    log_p: Tensor, log_q: Tensor, cost: Tensor, smoothing: float, rounds: int, largest: float
) -> Tensor:
    """Cost of the plan after some rounds, for each row: [N]. Its sums over Q's side equal P.

    Args:
        log_p, log_q: [N, C] log-probabilities; -inf for a class that a row leaves out.
        cost: D >= 0, symmetric, [C, C].
        smoothing: lambda > 0. Towards 0 the cost becomes that of the cheapest plan, after more
            and more rounds.
        rounds: >= 1.
        largest: a bound of D.
    """
    if largest / smoothing <= DIRECT:
        kernel = (cost / -smoothing).exp()
        u = (log_p > -torch.inf).to(cost.dtype)  # its scale is that of 1 / v
        return _direct(u, log_p.exp(), log_q.exp(), kernel, kernel * cost, rounds)
    size = max(1, CHUNK // cost.numel())
    parts = zip(log_p.split(size), log_q.split(size), strict=True)
    return torch.cat([_on_logarithms(p, q, cost, smoothing, rounds) for p, q in parts])


def _direct(u: Tensor, p: Tensor, q: Tensor, kernel: Tensor, moved: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        v = q / (u @ kernel)
        u = p / (v @ kernel)
    return (u * (v @ moved)).sum(dim=1)


def _on_logarithms(p: Tensor, q: Tensor, cost: Tensor, smoothing: float, rounds: int) -> Tensor:
    log_kernel = cost / -smoothing
    u = torch.zeros_like(p).masked_fill(p == -torch.inf, -torch.inf)
    for _ in range(rounds):
        v = q - _product(log_kernel, u)
        u = p - _product(log_kernel, v)
    return _planned(log_kernel, v, p.exp(), cost)


def _product(log_kernel: Tensor, log_u: Tensor) -> Tensor:
    """log(K u) by row, [N, C]; nothing of the size N x C x C is kept for the backward pass."""

    def product(log_u: Tensor) -> Tensor:
        return (log_u[:, None] + log_kernel).logsumexp(dim=2)

    made: Tensor = checkpoint(product, log_u, use_reentrant=False, preserve_rng_state=False)
    return made


def _planned(log_kernel: Tensor, log_v: Tensor, p: Tensor, cost: Tensor) -> Tensor:
    def planned(log_v: Tensor, p: Tensor) -> Tensor:
        shares = (log_v[:, None] + log_kernel).softmax(dim=2)
        return (p * (shares * cost).sum(dim=2)).sum(dim=1)

    made: Tensor = checkpoint(planned, log_v, p, use_reentrant=False, preserve_rng_state=False)
    return made
