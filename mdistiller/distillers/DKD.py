"""DKD. Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679.

KD splits into knowledge about the target class t and about the others. With b = (p_t, 1 - p_t) the
binary probabilities and r = softmax over the classes j != t, both of logits / T:

    TCKD = T^2 / N * sum_n KL(b_teacher || b_student)
    NCKD = T^2 / N * sum_n KL(r_teacher || r_student)
    loss = min(epoch / WARMUP, 1) * (ALPHA * TCKD + BETA * NCKD)

MODE "tckd" or "nckd" leaves the other term out, "dkd" has both. DIVERGENCE puts another divergence
in KL's place in both terms; see `helpers/losses/divergence.py`.

Everything is evaluated on log-probabilities: log(1 - p_t) is a logsumexp over j != t, never the log
of a rounded probability, so the loss stays finite where the textbook form gives inf and NaN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.decoupled import labelled_rows, target_column
from mdistiller.distillers.helpers.losses.divergence import read_divergence
from mdistiller.distillers.helpers.losses.logit_losses import dkd_loss, dkd_rows, dkd_terms
from mdistiller.distillers.helpers.losses.split import Split, split_terms
from mdistiller.distillers.helpers.training.settings import (
    require_one_of,
    require_positive,
    warmup_factor,
)

__all__ = ["DKD", "dkd_loss", "dkd_rows", "dkd_terms", "mode_weights"]


def mode_weights(mode: str, alpha: float, beta: float) -> tuple[float, float]:
    """Weights of TCKD and NCKD under DKD.MODE: "tckd" and "nckd" keep only the one of that name."""
    require_one_of("DKD.MODE", mode, ("dkd", "tckd", "nckd"))
    return (0.0 if mode == "nckd" else alpha), (0.0 if mode == "tckd" else beta)


@DISTILLERS.register(
    "DKD",
    config={
        "CE_WEIGHT": 1.0,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "T": 4.0,
        "WARMUP": 20,
        "MODE": "dkd",  # both terms; tckd or nckd: one of them
        "DIVERGENCE": "kl",  # kl, reverse_kl or ab(ALPHA, BETA)
    },
)
class DKD(Distiller):
    """Target-class and non-target-class knowledge with a weight each, after a linear warm-up.

    The unweighted terms are kept as metrics `tckd` and `nckd`.
    """

    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.ce_loss_weight = cfg.DKD.CE_WEIGHT
        self.alpha, self.beta = mode_weights(cfg.DKD.MODE, cfg.DKD.ALPHA, cfg.DKD.BETA)
        self.temperature = require_positive("DKD.T", cfg.DKD.T)
        self.divergence = read_divergence("DKD.DIVERGENCE", cfg.DKD.DIVERGENCE)
        self.warmup = cfg.DKD.WARMUP

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        tckd, nckd = dkd_terms(
            student.logits, teacher.logits, target, self.temperature, self.divergence
        )
        self.metrics = {"tckd": tckd.detach(), "nckd": nckd.detach()}
        return warmup_factor(batch["epoch"], self.warmup) * (self.alpha * tckd + self.beta * nckd)

    def distill_rows(
        self, student: Output, teacher: Output, target: Tensor, **batch: Any
    ) -> Tensor:
        _, labelled = target_column(target)
        logits = student.logits, teacher.logits
        tckd, nckd = (
            labelled_rows(rows, labelled)
            for rows in dkd_rows(*logits, target, self.temperature, self.divergence)
        )
        self.metrics = {"tckd": tckd.detach().mean(), "nckd": nckd.detach().mean()}
        return warmup_factor(batch["epoch"], self.warmup) * (self.alpha * tckd + self.beta * nckd)

    def distill_split(
        self, student: Output, teacher: Output, target: Tensor, split: Split, **batch: Any
    ) -> tuple[Tensor, Tensor]:
        epoch, logits = batch["epoch"], (student.logits, teacher.logits)
        tckd, nckd = split_terms(
            *logits, target, self.temperature, split, epoch, as_kd=False, form=self.divergence
        )
        self.metrics = {"tckd": tckd.detach(), "nckd": nckd.detach()}
        warm = warmup_factor(epoch, self.warmup)
        return warm * self.alpha * tckd, warm * self.beta * nckd
