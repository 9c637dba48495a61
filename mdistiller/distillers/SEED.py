"""SEED. Fang et al.: SEED: Self-supervised Distillation for Visual Representation, ICLR 2021,
arXiv 2101.04731.

z_t is the teacher's summary vector of an image scaled to length 1, z_s that of the student after a
projection to the same width. A queue holds K such vectors of the teacher, of the images before.
With D+ the queue and, as its last entry, the image's own z_t:

    q = softmax(z_t . D+ / TEACHER_TEMPERATURE),  p = softmax(z_s . D+ / STUDENT_TEMPERATURE)
    loss = -mean over the batch of sum_j q_j log p_j

Then the batch of all processes replaces the oldest entries. Where labels are given, their
cross-entropy is added.

Temperatures and the queue's length are the paper's. Ours: the queue is at most as long as the
training set; the teacher is any frozen network, where the paper's has a contrastive head; the
projection is Linear, ReLU, Linear, as wide as the teacher's vector in between, and not a part of
the student's file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import probe
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import require_positive


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, student_tau: float, teacher_tau: float
) -> Tensor:
    """Cross-entropy of the two distributions over the queue and the teacher's own vector, a scalar.

    Args:
        student, teacher: unit vectors of the same images, [N, D].
        queue: unit vectors of the teacher, [K, D].
        student_tau, teacher_tau: temperatures.
    """
    student, teacher, queue = (full_precision(x) for x in (student, teacher, queue))

    def scores(z: Tensor) -> Tensor:
        last = (z * teacher).sum(dim=1, keepdim=True)
        return torch.cat([z @ queue.T, last], dim=1)

    q = scores(teacher / teacher_tau).softmax(dim=1)
    return F.cross_entropy(scores(student / student_tau), q)


@DISTILLERS.register(
    "SEED",
    config={
        "QUEUE": 65536,  # vectors; at most the number of training images
        "TEACHER_TEMPERATURE": 0.01,
        "STUDENT_TEMPERATURE": 0.2,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
    },
)
class SEED(Distiller):
    """Similarity to earlier images: the student's distribution over a queue matches the teacher's.

    Args:
        num_data: number of training images.
    """

    needs_teacher_classifier = False
    teacher_summary_only = True
    needs_labels = False
    soft_labels = True
    own_state = ("queue", "position")
    queue: Tensor
    position: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        cfg: Any,
        num_data: int,
        image_size: tuple[int, int] | None = None,
    ):
        super().__init__(student, teacher)
        node = cfg.SEED
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.feat_loss_weight = node.LOSS.FEAT_WEIGHT
        self.taus = [
            require_positive(f"SEED.{key}", node[key])
            for key in ("STUDENT_TEMPERATURE", "TEACHER_TEMPERATURE")
        ]
        require_positive("SEED.QUEUE", node.QUEUE)
        s_width, t_width = (
            probe(net, image_size)["pooled_feat"][1:].numel() for net in (student, teacher)
        )
        self.projection = nn.Sequential(
            nn.Linear(s_width, t_width), nn.ReLU(), nn.Linear(t_width, t_width)
        )
        length = min(node.QUEUE, num_data) if num_data else node.QUEUE
        self.register_buffer("queue", unit(torch.randn(length, t_width)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        z_s = unit(self.projection(student["pooled_feat"].flatten(1)))
        z_t = unit(teacher["pooled_feat"].flatten(1))
        loss = seed_loss(z_s, z_t, self.queue.clone(), *self.taus)
        if self.training:
            self.enqueue(z_t)
        return self.feat_loss_weight * loss

    @torch.no_grad()
    def enqueue(self, vectors: Tensor) -> None:
        """Replace the oldest entries by the teacher's vectors [N, D] of all processes."""
        (vectors,) = gather_batch(vectors)
        length = len(self.queue)
        vectors = vectors[-length:].to(self.queue.dtype)
        places = torch.arange(len(vectors), device=vectors.device) + self.position
        self.queue.index_copy_(0, places % length, vectors)
        self.position.copy_((self.position + len(vectors)) % length)
