"""RADIO. Ranzinger et al.: AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024, arXiv
2312.06709; standardisation of the teacher's outputs: PHI-S, arXiv 2410.01680.

The student matches the teacher's summary vector t (`pooled_feat`) and its dense map T
(`final_map`, without class, register and distillation tokens), each through a head of its own, a
perceptron with one hidden layer. With s and S after the heads, S brought to the size of T by
bilinear interpolation, and c the cosine over channels:

    summary = 1 - c(s, t)
    map = 0.9 (1 - c(S, T)) + 0.1 smooth_l1(S, T), means over positions

t and T are standardised by PHI-S (`helpers/losses/phi_s.py`), from one pass of the teacher over
training images. Where labels are given, their cross-entropy is added. The heads are not a part of
the student's file.

Ours: both outputs are standardised, where the papers have one teacher's map beside others'; a head
is as wide as the teacher's output; the standardisation is of 1,024 evenly spread training
images, and 16 positions of each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import probe
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.losses.phi_s import phi_s, standardized
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive
from mdistiller.distillers.helpers.training.teacher_facts import TeacherFact

POSITIONS = 16  # of an image's map that its standardisation is computed from
OUTPUTS = ("pooled_feat", "final_map")


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over the last dimension, a scalar."""
    student, teacher = full_precision(student), full_precision(teacher)
    return 1 - (unit(student) * unit(teacher)).sum(dim=-1).mean()


def map_loss(student: Tensor, teacher: Tensor, cosine: float, smooth_l1: float) -> Tensor:
    """Weighted cosine and smooth L1 loss of maps [N, h, w, D] and [N, H, W, D], a scalar."""
    if student.shape[1:3] != teacher.shape[1:3]:
        size = list(teacher.shape[1:3])
        moved = F.interpolate(student.permute(0, 3, 1, 2), size=size, mode="bilinear")
        student = moved.permute(0, 2, 3, 1)
    distance = F.smooth_l1_loss(student, teacher)
    return cosine * cosine_loss(student, teacher) + smooth_l1 * distance


def make_head(inputs: int, outputs: int) -> nn.Sequential:
    """The perceptron from the student's width to the teacher's, on the last dimension."""
    return nn.Sequential(
        nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU(), nn.Linear(outputs, outputs)
    )


@DISTILLERS.register(
    "RADIO",
    config={
        "STANDARDIZE": "phi_s",  # or none
        "IMAGES": 1024,  # training images that the standardisation is computed from
        "COSINE": 0.9,  # of the map's loss
        "SMOOTH_L1": 0.1,
        "LOSS": {"CE_WEIGHT": 1.0, "SUMMARY_WEIGHT": 1.0, "MAP_WEIGHT": 1.0},
    },
)
class RADIO(Distiller):
    """Summary vector and dense map of the teacher, standardised, through a head for each.

    The unweighted terms are kept as metrics `radio_summary` and `radio_map`.
    """

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True
    own_state = ("standard_",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        cfg: Any,
        image_size: tuple[int, int] | None = None,
    ):
        super().__init__(student, teacher)
        self.node = node = cfg.RADIO
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        shapes = [probe(net, image_size) for net in (student, teacher)]
        widths = {name: [shape[name][1] for shape in shapes] for name in OUTPUTS}
        self.heads = nn.ModuleDict({name: make_head(*widths[name]) for name in OUTPUTS})
        for name, (_, width) in widths.items():  # as they are, until `take_fact`
            self.register_buffer(f"standard_{name}", torch.eye(width + 1, width).roll(1, 0))
        standardize = require_one_of("RADIO.STANDARDIZE", node.STANDARDIZE, ("phi_s", "none"))
        images = int(require_positive("RADIO.IMAGES", node.IMAGES))
        if standardize == "phi_s":
            self.teacher_facts = {
                f"standard_{name}": TeacherFact(
                    output=name,
                    per_class=images,
                    by_class=False,
                    reduce=functools.partial(_standard, width=width),
                    recipe="PHI-S",
                    positions=POSITIONS,
                )
                for name, (_, width) in widths.items()
            }

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        pairs = [self.matched(name, student[name], teacher[name]) for name in OUTPUTS]
        summary = cosine_loss(*pairs[0])
        dense = map_loss(*pairs[1], self.node.COSINE, self.node.SMOOTH_L1)
        self.metrics = {"radio_summary": summary.detach(), "radio_map": dense.detach()}
        weights = self.node.LOSS
        return weights.SUMMARY_WEIGHT * summary + weights.MAP_WEIGHT * dense

    def matched(self, name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """An output of the student after its head, and of the teacher standardised, channels last.

        Args:
            student, teacher: [N, C, ...] and [N, D, ...].
        """
        ours, theirs = student.movedim(1, -1), teacher.movedim(1, -1)
        standard = getattr(self, f"standard_{name}")
        return self.heads[name](ours), standardized(theirs, standard)


def _standard(rows: Tensor, width: int) -> Tensor:
    return phi_s(rows.reshape(-1, width))
