"""SIMKD. Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher
Classifier, CVPR 2022, arXiv 2203.14001.

The student keeps its layers up to its last map F_student and gets the teacher's classifier, frozen.
Between them is a neck g: 1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU, whose middle
has FACTOR times fewer channels than the teacher's map. The larger map is averaged to the size of
the other one, on the student's side before g.

    loss = mean over all entries of (g(F_student) - F_teacher)^2, and nothing else

There is no cross-entropy; backbone and g learn. Prediction is the teacher's classifier on the
average of g(F_student), in training and at test.

Neck and classifier take the place of the student's own classifier: student files hold backbone,
neck and head, which is all that a deployed student needs, and tools/eval.py and TEACHER_CKPT read
them like any other. (The authors' code runs the teacher at test too, to learn the size of its map;
here the neck knows it.)

g ends in a ReLU and cannot reach negative values of a teacher's last map; the zoo's networks have
none there. A teacher or student whose classifier is not a linear layer on the average of
`final_map` is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.connectors import pool_to
from mdistiller.distillers.helpers.features.heads import linear_head
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.numerics import full_precision, mean_square_error
from mdistiller.registry import UserError


def simkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the last maps, a scalar.

    Args:
        student: g(F_student) [N, C, H, W].
        teacher: [N, C, H', W'], averaged to H x W first.
    """
    student = full_precision(student)
    return mean_square_error(student, pool_to(full_precision(teacher), student))


@DISTILLERS.register("SIMKD", config={"FACTOR": 2, "WEIGHT": 1.0})
class SimKD(Distiller):
    """The student's last map, through a neck, imitates the teacher's and is classified like it."""

    soft_labels = True
    ce_loss_weight = 0.0
    alone = "it gives the student another head"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.weight = cfg.SIMKD.WEIGHT
        linear_head(student, "student")
        head = linear_head(teacher, "teacher")
        width, *size = probe(teacher, image_size)["final_map"][1:]
        if not 1 <= cfg.SIMKD.FACTOR <= width:
            raise UserError(
                f"SIMKD.FACTOR must be between 1 and {width}, the channels of the teacher's last "
                f"map, got {cfg.SIMKD.FACTOR}"
            )
        if not hasattr(student, "add_neck"):
            raise UserError(
                f"SIMKD gives the student another head, which {type(student).__name__} does not "
                "take (add_neck()); choose a student of the model zoo"
            )
        student.add_neck(width // cfg.SIMKD.FACTOR, width, tuple(size))  # type: ignore[operator]
        self.reuse(head)

    @torch.no_grad()
    def reuse(self, head: nn.Linear | nn.Conv2d) -> None:
        """Give the student's classifier the weights of `head`, to stay."""
        student_head = linear_head(self.student, "student").requires_grad_(False)
        student_head.weight.copy_(head.weight.view_as(student_head.weight))
        assert student_head.bias is not None
        student_head.bias.copy_(
            torch.zeros_like(student_head.bias) if head.bias is None else head.bias
        )

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The backbone's and the neck's: the classifier stays as it is."""
        return [p for p in super().get_learnable_parameters() if p.requires_grad]

    def get_extra_parameters(self) -> int:
        """The neck, which stays at test time."""
        return sum(p.numel() for p in self.student.get_submodule("neck").parameters())

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.weight * simkd_loss(student["final_map"], teacher["final_map"])
