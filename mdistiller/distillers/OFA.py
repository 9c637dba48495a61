"""OFA. Hao et al.: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
Distillation, NeurIPS 2023, arXiv 2310.19444.

A branch behind each stage of the student ends in logits (`helpers/features/branches.py`), so only
logits are compared and the two networks need not resemble each other. With the teacher's
p = softmax(z_teacher / T), the student's q = softmax(z_student / T), and the target class t:

    ofa(z) = -1 / N * sum_n (((1 + p_t)^EPS - 1) log q_t + sum_{c != t} p_c^EPS log q_c)
    loss   = CE_WEIGHT * CE + KD_WEIGHT * ofa(logits) + FEAT_WEIGHT * sum over stages of ofa(branch)

CE is smoothed by LABEL_SMOOTHING. With EPS = 1, ofa is the soft cross-entropy.

Paper and code differ. FORM "code" is the above. FORM "paper" has (1 + p_t)^EPS log q_t, and
p_c without exponent; its 1 is the cross-entropy, at the branches as well, so CE is not added again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.branches import ConvBranch, TokenBranch
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean, target_mask
from mdistiller.distillers.helpers.losses.numerics import scale_logits
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive
from mdistiller.registry import UserError

FORMS = ("code", "paper")


def ofa_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    eps: float = 1.0,
    temperature: float = 1.0,
    form: str = "code",
) -> Tensor:
    """ofa as above, a scalar; 0 if no sample has a label.

    Args:
        logits_student, logits_teacher: [N, C].
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] class probabilities, of
            which the largest counts.
        eps: exponent > 0.
        temperature: T > 0.
        form: "code" or "paper".
    """
    is_target, labelled = target_mask(target, logits_student.shape[1])
    log_q = F.log_softmax(scale_logits(logits_student, temperature), dim=1)
    p = F.softmax(scale_logits(logits_teacher, temperature), dim=1)
    if form == "code":
        weight = torch.where(is_target, torch.expm1(eps * torch.log1p(p)), p**eps)
    else:
        weight = torch.where(is_target, (1 + p) ** eps, p)
    return labelled_mean(-(weight * log_q).sum(dim=1), labelled)


def resolve_stages(stages: Sequence[int], count: int) -> list[int]:
    """The stages, from 1, that get a branch: those given, or all of `count` if none are."""
    chosen = list(stages) or list(range(1, count + 1))
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(1, count + 1)):
        raise UserError(f"OFA.STAGES {list(stages)}: this student has the stages 1 to {count}")
    return chosen


def resolve_eps(eps: Sequence[float], branches: int) -> list[float]:
    """Exponents of the branches and, last, of the logits; a single one is for all."""
    values = list(eps) * (branches + 1) if len(eps) == 1 else list(eps)
    if len(values) != branches + 1 or min(values) <= 0:
        raise UserError(
            f"OFA.EPS {list(eps)} must hold one positive value, or {branches + 1}: one for each "
            "branch and one for the logits"
        )
    return values


@DISTILLERS.register(
    "OFA",
    config={
        "EPS": [1.0],  # one for all, or one for each branch and one for the logits
        "STAGES": [],  # of the student, from 1; empty: all
        "T": 1.0,
        "FORM": "code",  # or paper
        "LABEL_SMOOTHING": 0.1,
        "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
    },
)
class OFA(Distiller):
    """Logits at every stage of the student learn from the teacher's, whatever its architecture.

    The unweighted terms are kept as metrics: `ofa_logits`, and `ofa_stages`, their sum.
    """

    soft_labels = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        node = cfg.OFA
        if not 0 <= node.LABEL_SMOOTHING < 1:
            raise UserError(f"OFA.LABEL_SMOOTHING must be in [0, 1), got {node.LABEL_SMOOTHING}")
        form = require_one_of("OFA.FORM", node.FORM, FORMS)
        self.settings: dict[str, Any] = {
            "temperature": require_positive("OFA.T", node.T),
            "form": form,
        }
        self.ce_loss_weight = node.LOSS.CE_WEIGHT if node.FORM == "code" else 0.0
        self.label_smoothing = node.LABEL_SMOOTHING
        self.kd_loss_weight, self.feat_loss_weight = node.LOSS.KD_WEIGHT, node.LOSS.FEAT_WEIGHT
        self.stages = resolve_stages(node.STAGES, len(probe(student, image_size)["feats"]) - 1)
        self.eps = resolve_eps(node.EPS, len(self.stages))
        self.branches = make_branches(student, teacher, self.stages, image_size)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        of_logits = ofa_loss(student.logits, teacher.logits, target, self.eps[-1], **self.settings)
        of_stages = [
            ofa_loss(logits, teacher.logits, target, eps, **self.settings)
            for logits, eps in zip(self.branch_logits(student), self.eps, strict=False)
        ]
        total = torch.stack(of_stages).sum()
        self.metrics = {"ofa_logits": of_logits.detach(), "ofa_stages": total.detach()}
        return self.kd_loss_weight * of_logits + self.feat_loss_weight * total

    def branch_logits(self, student: Output) -> Iterator[Tensor]:
        """Logits [N, C] of each branch."""
        feats = student["feats"]
        class_tokens = student["class_tokens"] if "class_tokens" in student.features else []
        for stage, branch in zip(self.stages, self.branches, strict=True):
            yield branch(feats[stage], *class_tokens[stage - 1 : stage])


def make_branches(
    student: nn.Module,
    teacher: nn.Module,
    stages: Sequence[int],
    image_size: Size,
) -> nn.ModuleList:
    """A branch behind each of the student's stages."""
    shapes, others = probe(student, image_size), probe(teacher, image_size)
    s_width, t_width = (shape["pooled_feat"][1:].numel() for shape in (shapes, others))
    count, classes = len(shapes["feats"]) - 1, shapes["logits"][1]
    branches: list[nn.Module] = []
    for stage in stages:
        shape, later = shapes["feats"][stage], count - stage
        if getattr(student, "tokens", False):
            branches.append(TokenBranch(shape, later, s_width, classes))
        else:
            branches.append(ConvBranch(shape, later, max(s_width, t_width), classes))
    return nn.ModuleList(branches)
