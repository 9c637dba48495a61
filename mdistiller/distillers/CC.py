"""CC. Peng, Jin, Liu, Zhou, Wu, Liu, Zhang: Correlation Congruence for Knowledge Distillation,
ICCV 2019, arXiv 1904.01802.

Two losses go by this name; CC.FORM chooses.

"neighbour" (RepDistiller; with weight 0.02 the published CIFAR-100 numbers of that benchmark): with
d_i = |S x_i - T y_i|, elementwise, S and T linear maps of the pooled features of student and
teacher to FEAT_DIM values, both trained:

    loss = 1 / (N - 1) * sum_{i < N} d_i . d_{i+1}

It takes samples in the order of the batch. Nothing keeps S and T from shrinking.

"kernel" (Knowledge-Distillation-Zoo, there with weight 100; the paper's Taylor expansion of a
Gaussian kernel), with the pooled features scaled to length 1 and nothing to train:

    K_ij = sum_{q=0}^{ORDER} e^{-2 GAMMA} (2 GAMMA)^q / q! (x_i . x_j)^q
    loss = 1 / N^2 * sum_ij (K_student - K_teacher)_ij^2

The batch is that of all processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.numerics import full_precision, gram, unit
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError

WEIGHTS = {"neighbour": 0.02, "kernel": 100.0}
"""Published weights of the two forms, whose values are of another order."""


def neighbour_loss(e_s: Tensor, e_t: Tensor) -> Tensor:
    """Products of the absolute differences of neighbouring samples; embeddings [N, d], a scalar."""
    differences = (full_precision(e_s) - full_precision(e_t)).abs()
    products = differences[:-1] * differences[1:]
    return products.sum() / max(1, len(differences) - 1)


def kernel_matrix(features: Tensor, gamma: float, order: int) -> Tensor:
    """K as above of features [N, ...]: [N, N]."""
    cosine = gram(unit(full_precision(features).flatten(1)))
    terms = ((2 * gamma) ** q / math.factorial(q) * cosine**q for q in range(1, order + 1))
    return math.exp(-2 * gamma) * sum(terms, cosine.new_ones(()))


def kernel_loss(f_s: Tensor, f_t: Tensor, gamma: float, order: int) -> Tensor:
    """Mean squared difference of the kernel matrices; features [N, D] and [N, D'], a scalar."""
    return F.mse_loss(kernel_matrix(f_s, gamma, order), kernel_matrix(f_t, gamma, order))


def cc_loss(
    student: Tensor, teacher: Tensor, form: str = "neighbour", gamma: float = 0.4, order: int = 2
) -> Tensor:
    """Correlation congruence in one of its two forms, a scalar.

    Args:
        student, teacher: "neighbour": embeddings [N, d]; "kernel": features [N, D] and [N, D'].
        form: "neighbour" or "kernel".
        gamma, order: of the kernel.

    Raises:
        UserError: there is no such form.
    """
    if form == "neighbour":
        return neighbour_loss(student, teacher)
    if form == "kernel":
        return kernel_loss(student, teacher, gamma, order)
    raise unknown_form(form)


def unknown_form(form: str) -> UserError:
    """The error for an unknown CC.FORM."""
    return UserError(f"CC.FORM {form!r} is neither neighbour nor kernel")


@DISTILLERS.register(
    "CC",
    config={
        "FORM": "neighbour",  # or kernel
        "FEAT_DIM": 128,  # neighbour: width of the embeddings
        "GAMMA": 0.4,  # kernel
        "ORDER": 2,  # kernel
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": -1.0},  # -1: that of the form, see WEIGHTS
    },
)
class CC(Distiller):
    """Correlation congruence: relations between samples are as the teacher's."""

    needs_teacher_classifier = False
    teacher_summary_only = True
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.settings = {"form": cfg.CC.FORM, "gamma": cfg.CC.GAMMA, "order": cfg.CC.ORDER}
        self.ce_loss_weight = cfg.CC.LOSS.CE_WEIGHT
        weight = cfg.CC.LOSS.FEAT_WEIGHT
        self.feat_loss_weight = WEIGHTS.get(cfg.CC.FORM, weight) if weight < 0 else weight
        self.embed_s: nn.Module = nn.Flatten()
        self.embed_t: nn.Module = nn.Flatten()
        width = int(require_positive("CC.FEAT_DIM", cfg.CC.FEAT_DIM))
        if cfg.CC.FORM == "neighbour":
            s_width, t_width = (
                probe(net, image_size)["pooled_feat"][1:].numel() for net in (student, teacher)
            )
            self.embed_s = nn.Sequential(nn.Flatten(), nn.Linear(s_width, width))
            self.embed_t = nn.Sequential(nn.Flatten(), nn.Linear(t_width, width))
        elif cfg.CC.FORM != "kernel":
            raise unknown_form(cfg.CC.FORM)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_feat, t_feat = gather_batch(
            self.embed_s(student["pooled_feat"]), self.embed_t(teacher["pooled_feat"])
        )
        return self.feat_loss_weight * cc_loss(s_feat, t_feat, **self.settings)
