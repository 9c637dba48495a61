"""CRD. Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020, arXiv 1910.10699.

Both networks' pooled features are embedded linearly and scaled to unit length (v). A bank holds the
embedding m of every training image by either network. Each embedding of image i is contrasted, in
the other network's bank, with a positive (k = 0: i itself) and K negatives of other classes. With
n images, c = K / n and e = 1e-7:

    a_k = v . m_k / TEMPERATURE - log Z
    side = -mean over i of [ log p_0 + sum over k >= 1 of log(1 - p_k) ],
           p = exp(a) / (exp(a) + c + e),  1 - p taken as c / (exp(a) + c + e)
    loss = side(student in the teacher's bank) + side(teacher in the student's bank)

on log-probabilities throughout. Z is n times the mean of exp(v . m / TEMPERATURE) over the first
batch, kept from then on. After the loss, rows of the batch's images move towards the embeddings.

NCE.K negatives are drawn in here, without replacement if the other classes have as many images;
MODE exact contrasts with the image itself, relax with another one of its class. A loader that gives
`contrastive_index` decides instead, as in the original library.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.training.memory_bank import Bank
from mdistiller.distillers.helpers.training.negatives import Negatives
from mdistiller.distillers.helpers.training.settings import require_positive, resolve_setting
from mdistiller.registry import UserError

DEFAULTS: dict[str, Any] = {
    "MODE": "exact",
    "FEAT": {"DIM": 128, "STUDENT_DIM": 256, "TEACHER_DIM": 256},
    "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.8},
    "NCE": {"K": 16384, "MOMENTUM": 0.5, "TEMPERATURE": 0.07},
}
EPS = 1e-7


def contrast_loss(scores: Tensor, num_data: int) -> Tensor:
    """Noise-contrastive loss of one side, a scalar.

    Args:
        scores: a, [N, K + 1], the positive's first.
        num_data: n.
    """
    scores = full_precision(scores)
    noise = (scores.shape[1] - 1) / num_data
    log_noise, log_offset = math.log(noise), math.log(noise + EPS)
    # log(exp(a) + c + e) = a + softplus(log(c + e) - a) = log(c + e) + softplus(a - log(c + e))
    first, others = scores.split([1, scores.shape[1] - 1], dim=1)
    positive = F.softplus(log_offset - first.squeeze(1))
    negative = F.softplus(others - log_offset).sum(dim=1)
    return (positive + negative).mean() - others.shape[1] * (log_noise - log_offset)


def crd_loss(student: Tensor, teacher: Tensor, num_data: int) -> Tensor:
    """Sum of both sides; the arguments are the scores [N, K + 1] of :class:`Bank`."""
    return contrast_loss(student, num_data) + contrast_loss(teacher, num_data)


class Embed(nn.Module):
    """Linear map of features [N, ...] to unit vectors [N, d]."""

    def __init__(self, in_features: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(in_features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return unit(self.linear(x.flatten(1)))


@DISTILLERS.register("CRD", config=DEFAULTS)
class CRD(Distiller):
    """Contrastive representation distillation with a memory bank.

    Args:
        num_data: number of training images, the rows of the bank.
        targets: their classes, int64 [num_data]. Without them, negatives are any other images.
    """

    needs_teacher_classifier = False
    teacher_summary_only = True
    own_state = ("contrast.", "negatives.")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        cfg: Any,
        num_data: int,
        targets: Tensor | None = None,
        image_size: Size = None,
    ):
        super().__init__(student, teacher)
        node = cfg.CRD
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.feat_loss_weight = node.LOSS.FEAT_WEIGHT
        self.num_data = num_data
        self.mode = node.MODE
        _check(node)
        widths = [
            resolve_setting(
                f"CRD.FEAT.{key}",
                node.FEAT[key],
                DEFAULTS["FEAT"][key],
                probe(net, image_size)["pooled_feat"][1:].numel(),
            )
            for key, net in (("STUDENT_DIM", student), ("TEACHER_DIM", teacher))
        ]
        self.embed_s, self.embed_t = (Embed(width, node.FEAT.DIM) for width in widths)
        self.contrast = Bank(
            num_data, node.FEAT.DIM, node.NCE.K, node.NCE.TEMPERATURE, node.NCE.MOMENTUM
        )
        self.negatives = Negatives(targets, num_data, node.NCE.K)

    def get_extra_parameters(self) -> int:
        """The embeddings and the bank with its five numbers."""
        return super().get_extra_parameters() + sum(
            buffer.numel() for buffer in self.contrast.buffers()
        )

    def draw_contrast(self, index: Tensor) -> Tensor:
        """Positive and negatives of the images `index` [N] for one step, [N, K + 1]."""
        shape = len(index), self.negatives.k + 1
        contrast = torch.empty(shape, dtype=torch.int64, device=index.device)
        contrast[:, 0] = index if self.mode == "exact" else self.negatives.same_class(index)
        self.negatives.draw(index, out=contrast[:, 1:])
        return contrast

    def distill(
        self,
        student: Output,
        teacher: Output,
        target: Tensor,
        index: Tensor | None = None,
        contrastive_index: Tensor | None = None,
        **batch: Any,
    ) -> Tensor:
        if index is None:
            raise UserError("CRD needs the samples' numbers: a loader with (image, target, index)")
        if contrastive_index is None:
            contrastive_index = self.draw_contrast(index)
        embedded = self.embed_s(student["pooled_feat"]), self.embed_t(teacher["pooled_feat"])
        scores = self.contrast(*embedded, contrastive_index)
        self.contrast.update(index, *embedded)
        return self.feat_loss_weight * crd_loss(scores[0], scores[1], self.num_data)


def _check(node: Any) -> None:
    if node.MODE not in ("exact", "relax"):
        raise UserError(f"CRD.MODE must be exact or relax, got {node.MODE!r}")
    if node.NCE.TEMPERATURE < 0.02:  # exp(1 / TEMPERATURE) has to fit into float32
        raise UserError(f"CRD.NCE.TEMPERATURE must be at least 0.02, got {node.NCE.TEMPERATURE}")
    if not 0 <= node.NCE.MOMENTUM <= 1:
        raise UserError(f"CRD.NCE.MOMENTUM must be within 0 and 1, got {node.NCE.MOMENTUM}")
    require_positive("CRD.NCE.K", node.NCE.K)
    require_positive("CRD.FEAT.DIM", node.FEAT.DIM)
