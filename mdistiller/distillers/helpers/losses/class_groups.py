"""Classes in groups by the teacher's logits: what GDKD and GDKD3 share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import Distiller, Losses, Output
from mdistiller.distillers.helpers.losses.decoupled import group_log_probs
from mdistiller.distillers.helpers.losses.numerics import divergence, full_precision, scale_logits
from mdistiller.distillers.helpers.training.settings import (
    require_one_of,
    require_positive,
    warmup_factor,
)
from mdistiller.registry import UserError

KL_TYPES = ("forward", "reverse", "both")
CONFIG = {
    "CE_WEIGHT": 1.0,
    "W0": 1.0,
    "W1": 1.0,
    "W2": 8.0,
    "TOPK": 5,
    "STRATEGY": "best",  # the largest teacher logits
    "KL_TYPE": "forward",  # or reverse, both
    "T": 4.0,
    "WARMUP": 20,
}
"""Defaults of a method's node."""


def top_columns(logits_teacher: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Classes by falling teacher logit, the first `sizes[0]`, the next `sizes[1]`, ...: [N, size].

    With fewer classes, the last groups are smaller or not there.
    """
    count = min(sum(sizes), logits_teacher.shape[1])
    ranked = full_precision(logits_teacher).topk(count, dim=1).indices
    ends = [*itertools.accumulate(sizes[:-1])]
    return [part for part in ranked.tensor_split(ends, dim=1) if part.shape[1]]


def group_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    sizes: tuple[int, ...],
    temperature: float,
    kl_type: str = "forward",
) -> tuple[Tensor, list[Tensor]]:
    """Divergence of the groups' probabilities, and within each group, with T²: scalars.

    Args:
        logits_student, logits_teacher: [N, C].
        sizes: number of classes in the groups, by falling teacher logit; the others are one more.
        temperature: T > 0.
        kl_type: "forward", "reverse" or "both".
    """
    columns = top_columns(logits_teacher, sizes)
    (s_high, s_within), (t_high, t_within) = (
        group_log_probs(scale_logits(z, temperature), columns)
        for z in (logits_student, logits_teacher)
    )
    scale = temperature**2 / len(logits_student)
    high, *within = (
        _total(t, s, kl_type) * scale
        for t, s in zip([t_high, *t_within], [s_high, *s_within], strict=True)
    )
    return high, within


def _total(log_q: Tensor, log_p: Tensor, kl_type: str) -> Tensor:
    """Divergence of teacher q and student p in the directions of `kl_type`, over all samples."""
    if kl_type == "forward":
        return divergence(log_q, log_p, dim=None)
    if kl_type == "reverse":
        return divergence(log_p, log_q, dim=None)
    # the mean of both, with one difference
    return ((log_q.exp() - log_p.exp()) * (log_q - log_p)).sum() / 2


def weighted(terms: Losses, weights: tuple[float, ...]) -> Tensor:
    """Sum of the terms times their weights; a weight may have no term."""
    parts = [weight * term for weight, term in zip(weights, terms.values(), strict=False)]
    return torch.stack(parts).sum()


class GroupedKD(Distiller):
    """A method whose terms are weighted divergences of groups of classes.

    Class attributes:
        name: of its config node.
        smallest: the least TOPK that makes sense.
        terms: logits of both networks, TOPK, temperature and KL_TYPE to the unweighted terms, which
            are kept as metrics.
    """

    soft_labels = True
    takes_standardized_logits = True
    teacher_logits_only = True
    name: ClassVar[str]
    smallest: ClassVar[int]
    terms: ClassVar[Callable[..., Losses]]

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg[self.name]
        self.ce_loss_weight = node.CE_WEIGHT
        self.weights = node.W0, node.W1, node.W2
        self.topk = node.TOPK
        if self.topk < self.smallest:
            raise UserError(f"{self.name}.TOPK must be at least {self.smallest}, got {self.topk}")
        require_one_of(f"{self.name}.STRATEGY", node.STRATEGY, ("best",))
        self.kl_type = require_one_of(f"{self.name}.KL_TYPE", node.KL_TYPE, KL_TYPES)
        self.temperature = require_positive(f"{self.name}.T", node.T)
        self.warmup = node.WARMUP

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        logits = student.logits, teacher.logits
        terms = self.terms(*logits, self.topk, self.temperature, self.kl_type)
        self.metrics = {name: term.detach() for name, term in terms.items()}
        return warmup_factor(batch["epoch"], self.warmup) * weighted(terms, self.weights)
