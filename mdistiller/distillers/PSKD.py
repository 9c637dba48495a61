"""PSKD. Kim, Ji, Yoon, Hwang: Self-Knowledge Distillation with Progressive Refinement of Targets,
ICCV 2021, arXiv 2006.12000.

Self-distillation: no teacher. The targets of epoch t of T are the labels y, mixed with what the
student itself predicted for the image in the epoch before, P = softmax(z) at temperature 1:

    loss = -1/N * sum_n sum_c [(1 - alpha_t) y_nc + alpha_t P_nc] log softmax(z_n)_c
    alpha_t = ALPHA * t / T

An image without a prediction yet, as in the first epoch, takes its label in the place of P. ALPHA
0.8 is the authors' number on CIFAR-100; T is SOLVER.EPOCHS. Logged as two terms: `loss_ce` with
weight 1 - alpha_t, and `loss_kd`. Samples without a label do not count.

The predictions are float32 [images, classes] on the device and in every checkpoint (20 MB on
CIFAR-100, 5 GB on ImageNet), the same in every process. An image that occurs twice in an epoch is
stored as it was last; a prediction that is not finite is not stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses
from mdistiller.distillers.helpers.features.shapes import probe
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean, target_column
from mdistiller.distillers.helpers.losses.numerics import scale_logits
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.memory_bank import last_occurrence
from mdistiller.registry import UserError


def pskd_loss(logits: Tensor, past: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of past predictions over the labelled samples, a scalar.

    Args:
        logits: [N, C].
        past: probabilities of an earlier epoch [N, C]; a row of zeros stands for the label.
        target: [N] class indices, IGNORE_INDEX where unlabelled.
    """
    column, labelled = target_column(target)
    label = F.one_hot(column[:, 0], logits.shape[1]).to(past.dtype)
    soft = torch.where(past.any(dim=1, keepdim=True), past, label)
    rows = -(soft * F.log_softmax(scale_logits(logits, 1.0), dim=1)).sum(dim=1)
    return labelled_mean(rows, labelled)


@DISTILLERS.register("PSKD", config={"ALPHA": 0.8})
class PSKD(Distiller):
    """Labels mixed with the student's own predictions of the epoch before.

    Args:
        num_data: number of training images, the rows of `predictions`.
    """

    uses_teacher = False
    uses_hard_label_loss = True
    own_state = ("predictions",)
    predictions: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        cfg: Any,
        num_data: int,
        image_size: tuple[int, int] | None = None,
    ):
        super().__init__(student, None)
        self.alpha, self.epochs = cfg.PSKD.ALPHA, cfg.SOLVER.EPOCHS
        if not 0 <= self.alpha <= 1:
            raise UserError(f"PSKD.ALPHA must be within 0 and 1, got {self.alpha}")
        classes = probe(student, image_size)["logits"][1]
        self.register_buffer("predictions", torch.zeros(num_data, classes))

    def get_extra_parameters(self) -> int:
        return super().get_extra_parameters() + self.predictions.numel()

    def forward_train(
        self, image: Tensor, target: Tensor, index: Tensor | None = None, **batch: Any
    ) -> tuple[Tensor, Losses]:
        if index is None:
            raise UserError("PSKD needs the samples' numbers: a loader with (image, target, index)")
        logits = self.run_student(image).logits
        alpha = self.alpha * batch["epoch"] / self.epochs
        with torch.autocast(image.device.type, enabled=False):
            losses = {
                "loss_ce": (1 - alpha) * self.hard_label_loss(logits, target),
                "loss_kd": alpha * pskd_loss(logits, self.predictions[index], target),
            }
            self.remember(index, logits)
        return logits, losses

    @torch.no_grad()
    def remember(self, index: Tensor, logits: Tensor) -> None:
        """Store the predictions of the images `index` [N], over all processes."""
        index, now = gather_batch(index, scale_logits(logits, 1.0).softmax(dim=1))
        now = now[last_occurrence(index, len(self.predictions))]
        finite = now.isfinite().all(dim=1, keepdim=True)
        self.predictions[index] = torch.where(finite, now, self.predictions[index])
