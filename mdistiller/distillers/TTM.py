"""TTM and WTTM. Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching,
ICLR 2024, arXiv 2402.11148.

The teacher's probabilities are raised to the power GAMMA < 1, the student's stay as they are. With
p = softmax(v) of the teacher, q = softmax(z) of the student:

    t_c    = p_c^GAMMA / U,   U = sum_c p_c^GAMMA
    TTM    = BETA * mean over n of KL(t || q)
    WTTM   = BETA * mean over n of U_n KL(t_n || q_n)

t is softmax(GAMMA v), which is KD's teacher at temperature 1 / GAMMA; the student has none, and
there is no factor T^2. U lies between 1 and C^(1 - GAMMA); it gives uncertain teachers more weight.
The paper tunes both numbers for every pair of CIFAR-100 (TTM: GAMMA 0.1 to 0.4, BETA 7 to 101). At
flat predictions the divergence curves like 1 / C, so fewer classes want a smaller BETA: the 0.1 and
100 of resnet32x4 -> resnet8x4 did not train on 10 classes. The defaults are those of
resnet110 -> resnet20 for TTM, of resnet32x4 -> resnet8x4 for WTTM. DIVERGENCE puts another
divergence of t and q in KL's place; see `helpers/losses/divergence.py`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.divergence import Divergence, read_divergence
from mdistiller.distillers.helpers.losses.numerics import divergence, scale_logits
from mdistiller.distillers.helpers.training.settings import require_positive


def ttm_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    gamma: float,
    weighted: bool = False,
    form: Divergence = divergence,
) -> Tensor:
    """TTM, or WTTM if `weighted`, without BETA; a scalar.

    Args:
        logits_student, logits_teacher: [N, C].
        gamma: power of the teacher's probabilities, > 0.
        form: what is measured in place of the Kullback-Leibler divergence.
    """
    log_q = F.log_softmax(scale_logits(logits_student, 1.0), dim=1)
    log_t = F.log_softmax(scale_logits(logits_teacher, 1 / gamma), dim=1)
    rows = form(log_t, log_q)
    if weighted:
        log_p = F.log_softmax(scale_logits(logits_teacher, 1.0), dim=1)
        rows = rows * (gamma * log_p).logsumexp(dim=1).exp()
    return rows.mean()


@DISTILLERS.register(
    "TTM", config={"CE_WEIGHT": 1.0, "GAMMA": 0.2, "BETA": 8.0, "DIVERGENCE": "kl"}
)
class TTM(Distiller):
    """The student, at temperature 1, matches the teacher's flattened probabilities."""

    soft_labels = True
    takes_standardized_logits = True
    teacher_logits_only = True
    name = "TTM"
    weighted = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg[self.name]
        self.ce_loss_weight = node.CE_WEIGHT
        self.beta = node.BETA
        self.gamma = require_positive(f"{self.name}.GAMMA", node.GAMMA)
        self.divergence = read_divergence(f"{self.name}.DIVERGENCE", node.DIVERGENCE)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.beta * ttm_loss(
            student.logits, teacher.logits, self.gamma, self.weighted, self.divergence
        )


@DISTILLERS.register(
    "WTTM", config={"CE_WEIGHT": 1.0, "GAMMA": 0.1, "BETA": 3.0, "DIVERGENCE": "kl"}
)
class WTTM(TTM):
    """TTM with each sample weighted by how flat its teacher is."""

    name = "WTTM"
    weighted = True
