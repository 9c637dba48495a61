"""MLKD. Jin, Wang, Lin: Multi-Level Logit Distillation, CVPR 2023 (no arXiv version).

Student and teacher see a weakly and a strongly augmented view of each image. With P, Q the [N, C]
softmax predictions of student and teacher on the weak view at temperature T, P', Q' those on the
strong view, and masks m_n (samples) and m_c (classes) from the teacher's weak predictions at T = 1:

    kd_weak   = sum_T T^2 / N * sum_n m_n KL(Q_n || P_n)
    kd_strong = sum_T T^2 / N * sum_n KL(Q'_n || P'_n)
    cc        = sum_T 1 / C * sum_cd m_c (P^T P - Q^T Q)_cd^2
    bc        = sum_T 1 / N * sum_nk m_n (P P^T - Q Q^T)_nk^2
    loss      = CE_WEIGHT * (CE(weak) + CE(strong)) + KD_WEIGHT * (kd_weak + kd_strong + cc + bc)

m_n is 1 where the highest probability is at most its median over the batch, m_c where a class's
probability summed over the batch is at most its median over classes; else 0. (Of an even number of
values the lower middle one is the median.)

Paper and authors' code differ, and published numbers are the code's. MASK "per_item" is the
above. "as_coded", the default: a loss is averaged before the mask is applied, so m_n and m_c are
constants, their means (about 1/2); and from the fourth temperature on, kd_strong takes the weak
view. The student runs once for each view, so batch norm sees them apart, and its running statistics
move twice a step. Under LSKD, the kd terms take standardised logits, cc and bc plain ones.

The trainer `deepkd` splits each KL of the kd terms by the target class (`helpers/losses/split.py`);
cc and bc, which relate all classes, go with the other classes. That is a choice made here.

The batch is that of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses
from mdistiller.distillers.helpers.losses.numerics import divergence, scale_logits
from mdistiller.distillers.helpers.losses.split import Split, split_rows
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive
from mdistiller.registry import UserError

MASKS = ("as_coded", "per_item")
_STRONG_AS_CODED = 3  # as coded, the number of kd_strong's temperatures that are of the strong view
Pair = tuple[Tensor, Tensor]
Divergences = Callable[[Pair, Sequence[float]], Tensor]


def low_confidence(logits_teacher: Tensor) -> Pair:
    """Masks m_n [N] and m_c [C] of the teacher's logits [N, C] on the weak view, 0 or 1."""
    probs = scale_logits(logits_teacher, 1.0).softmax(dim=1)
    confidence, frequency = probs.amax(dim=1), probs.sum(dim=0)
    samples, classes = confidence <= confidence.median(), frequency <= frequency.median()
    return samples.to(probs.dtype), classes.to(probs.dtype)


def log_probs(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Log-softmax of logits [N, C] at K temperatures, [K, N, C]."""
    return torch.stack([F.log_softmax(scale_logits(logits, t), dim=1) for t in temperatures])


def divergences(logits: Pair, temperatures: Sequence[float]) -> Tensor:
    """T² KL(teacher || student) for K temperatures and N samples, [K, N]; logits 2 x [N, C]."""
    log_p, log_q = (log_probs(part, temperatures) for part in logits)
    rows = divergence(log_q, log_p)
    return torch.stack([t**2 * row for t, row in zip(temperatures, rows, strict=True)])


def split_divergences(target: Tensor, split: Split, epoch: int) -> Divergences:
    """:func:`divergences` as two parts, of the target class [N] and of the others; [2, K, N]."""

    def rows(logits: Pair, temperatures: Sequence[float]) -> Tensor:
        parts = [split_rows(*logits, target, t, split, epoch) for t in temperatures]
        return torch.stack([torch.stack(part) for part in zip(*parts, strict=True)])

    return rows


def masked_gram_error(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    """sum_k 1 / n * sum_ij mask_i (p_k p_k^T - q_k q_k^T)_ij²; [K, n, d], [K, n, d] and [n]."""
    difference = p @ p.mT - q @ q.mT
    return (mask[:, None] * difference.square()).sum() / len(mask)


def mlkd_terms(
    weak: Pair,
    strong: Pair,
    temperatures: Sequence[float],
    mask: str = "as_coded",
    standardize: Callable[[Tensor], Tensor] = lambda logits: logits,
    divergences: Divergences = divergences,
) -> Losses:
    """kd_weak, kd_strong, cc and bc as above, unweighted scalars.

    Args:
        weak, strong: logits of student and teacher on a view, [N, C] each.
        temperatures: all above 0.
        mask: "as_coded" or "per_item".
        standardize: what the kd terms do with logits [N, C] first.
        divergences: of K temperatures and N samples, [..., K, N]; kd_weak and kd_strong are [...].
    """
    samples, classes = low_confidence(weak[1])
    kd_weak, kd_strong = (
        divergences((standardize(view[0]), standardize(view[1])), temperatures)
        for view in (weak, strong)
    )
    if mask == "as_coded":
        strong_rows, weak_rows = (
            kd_strong[..., :_STRONG_AS_CODED, :],
            kd_weak[..., _STRONG_AS_CODED:, :],
        )
        kd_strong = torch.cat([strong_rows, weak_rows], dim=-2)
        samples, classes = (m.mean().expand_as(m) for m in (samples, classes))
    p, q = (log_probs(logits, temperatures).exp() for logits in weak)
    return {
        "kd_weak": (kd_weak * samples).sum((-2, -1)) / len(samples),
        "kd_strong": kd_strong.sum((-2, -1)) / len(samples),
        "cc": masked_gram_error(p.mT, q.mT, classes),
        "bc": masked_gram_error(p, q, samples),
    }


def _changed(kd: Any) -> bool:
    """Whether the KD node differs from its defaults, as in the authors' files for MLKD."""
    defaults = DISTILLERS.config["KD"]
    return (kd.TEMPERATURE, dict(kd.LOSS)) != (defaults["TEMPERATURE"], defaults["LOSS"])


@DISTILLERS.register(
    "MLKD",
    config={
        "TEMPS": [4.0, 3.0, 5.0, 2.0, 6.0],
        "MASK": "as_coded",  # or per_item
        "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
    },
)
class MLKD(Distiller):
    """Predictions agree on two views, and so do relations between classes and between samples.

    The unweighted terms are kept as metrics.
    """

    takes_standardized_logits = True
    uses_hard_label_loss = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.temperatures = [require_positive("MLKD.TEMPS", t) for t in cfg.MLKD.TEMPS]
        self.mask = require_one_of("MLKD.MASK", cfg.MLKD.MASK, MASKS)
        if (kd := getattr(cfg, "KD", None)) is not None and _changed(kd):
            raise UserError(
                "MLKD takes its settings from MLKD.TEMPS (the first is KD.TEMPERATURE of its "
                "authors' files) and MLKD.LOSS, not from KD; move them there"
            )
        if not self.temperatures:
            raise UserError("MLKD.TEMPS is empty; give one temperature or more")
        self.ce_loss_weight = cfg.MLKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.MLKD.LOSS.KD_WEIGHT

    @classmethod
    def can_split(cls) -> bool:
        """Whether the loss can be split by the target class."""
        return cls.forward_train is MLKD.forward_train

    def forward_train(  # type: ignore[override]
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **batch: Any
    ) -> tuple[Tensor, Losses]:
        """Logits of the weak view, and the loss terms."""
        images = image_weak, image_strong
        weak, strong = (self.run_student(image).logits for image in images)
        weak_teacher, strong_teacher = (self.run_teacher(image).logits for image in images)
        with torch.autocast(target.device.type, enabled=False):
            z, v, z_strong, v_strong, labels = gather_batch(
                weak, weak_teacher, strong, strong_teacher, target
            )
            rows: Divergences = divergences
            if self.split is not None:
                rows = split_divergences(labels, self.split, batch["epoch"])
            terms = mlkd_terms(
                (z, v), (z_strong, v_strong), self.temperatures, self.mask, self.standardize, rows
            )
            self.metrics = {name: term.detach().sum() for name, term in terms.items()}
            loss_ce = self.hard_label_loss(weak, target) + self.hard_label_loss(strong, target)
            losses = {"loss_ce": self.ce_loss_weight * loss_ce}
            if self.split is None:
                losses["loss_kd"] = self.kd_loss_weight * torch.stack(list(terms.values())).sum()
            else:
                target_part, others = terms["kd_weak"] + terms["kd_strong"]
                others = others + terms["cc"] + terms["bc"]
                losses["loss_tckd"] = self.kd_loss_weight * target_part
                losses["loss_nckd"] = self.kd_loss_weight * others
        return weak, losses
