"""OFD. Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation,
ICCV 2019, arXiv 1904.01866.

Stages are compared before their last ReLU. With S the student's map after a connector (convolution
and batch norm), T the teacher's averaged to the size of S, and a margin m <= 0 for each channel:

    T' = max(T, m)
    d = (S - T')^2 where S > T' or T' > 0, else 0
    loss = sum over stages i = 1..L of 2^(i - L) / N * sum(d)

m is the mean of the negative responses of the batch norm before the ReLU, or -3 standard deviations
if next to nothing is negative. The teacher runs in train mode, as in the authors' code: it uses
batch statistics (each process its own), and its running statistics drift.

Lists are aligned at the deep end and cut to the shortest of the student's stages, the teacher's,
and the teacher's batch norms. A student without pre-activations ends its stages linearly
(MobileNetV2): then `feats` are used. A teacher must have both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.connectors import pool_to
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.features.stages import warn_left_over
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.registry import UserError


def margin_from_norm(norm: nn.Module) -> Tensor:
    """Margins [C]: the mean of the negative values of a batch norm's output, if that is normal.

    With mean b and standard deviation s = |weight|: E[x | x < 0], or -3 s where P(x < 0) <= 0.001.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        raise UserError("OFD needs a teacher whose batch norms have weight and bias")
    std, mean = weight.detach().double().abs(), bias.detach().double()
    ratio = mean / std.clamp(min=1e-30)
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    margin = mean - std * density / below.clamp(min=1e-3)
    return torch.where(below > 0.001, margin, -3 * std).to(weight.dtype)


def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Partial squared distance of one stage, summed over channels and positions, a scalar.

    Args:
        student: the connector's output, [N, C, H, W].
        teacher: [N, C, H', W'].
        margin: not positive, [C] or [1, C, 1, 1].
    """
    student = full_precision(student)
    teacher = pool_to(full_precision(teacher), student)
    total: Tensor = _PartialSquare.apply(student, teacher, margin.reshape(-1, 1, 1))
    return total / len(student)


class _PartialSquare(torch.autograd.Function):
    """Sum of squares of max(S - T', 0 or, where T' > 0, -infinity).

    These are the largest maps of a network: with two temporaries in place of autograd's eight this
    takes less than half the time on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
        bound = torch.maximum(teacher, margin)
        surplus = student - bound
        bound.gt_(0).mul_(-torch.finfo(bound.dtype).max)
        torch.maximum(surplus, bound, out=surplus)
        ctx.save_for_backward(surplus)
        # Norms of rows that lie together: the quickest sum of squares, and of few enough numbers
        # each not to lose digits.
        last = surplus.is_contiguous(memory_format=torch.channels_last)
        rows = torch.linalg.vector_norm(surplus, dim=(1, 3) if last else (2, 3))
        return rows.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (surplus,) = ctx.saved_tensors
        return surplus * (2 * gradient), None, None


class Connectors(nn.Module):
    """For each stage a convolution without bias and a batch norm, student to teacher width."""

    def __init__(self, s_widths: Sequence[int], t_widths: Sequence[int], kernel_size: int):
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(s, t, kernel_size, padding=(kernel_size - 1) // 2, bias=False),
                nn.BatchNorm2d(t),
            )
            for s, t in zip(s_widths, t_widths, strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [connect(x) for connect, x in zip(self.connectors, maps, strict=True)]


@DISTILLERS.register(
    "OFD",
    config={
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.001},
        "CONNECTOR": {"KERNEL_SIZE": 1},
    },
)
class OFD(Distiller):
    """Overhauled feature distillation: pre-activations of all stages with a partial distance."""

    needs_teacher_classifier = False
    soft_labels = True
    teacher_in_eval_mode = False

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.OFD.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.OFD.LOSS.FEAT_WEIGHT
        kernel_size = cfg.OFD.CONNECTOR.KERNEL_SIZE
        if kernel_size < 1:
            raise UserError(f"OFD.CONNECTOR.KERNEL_SIZE must be at least 1, got {kernel_size}")
        if not hasattr(teacher, "get_bn_before_relu"):
            raise UserError(
                f"OFD reads margins from get_bn_before_relu(), which the teacher "
                f"{type(teacher).__name__} does not have"
            )
        norms = list(cast(Any, teacher).get_bn_before_relu())
        shapes = probe(student, image_size)
        self.student_key = "preact_feats" if "preact_feats" in shapes else "feats"
        s_widths = [shape[1] for shape in shapes[self.student_key][1:]]
        t_widths = [shape[1] for shape in probe(teacher, image_size)["preact_feats"][1:]]
        self.depth = depth = min(len(s_widths), len(t_widths), len(norms))
        counts = len(s_widths), len(t_widths)
        warn_left_over(*counts, [(counts[0] - i, counts[1] - i) for i in range(depth, 0, -1)])
        s_widths, t_widths, norms = (x[-self.depth :] for x in (s_widths, t_widths, norms))
        self.connectors = Connectors(s_widths, t_widths, kernel_size)
        for i, (norm, width) in enumerate(zip(norms, t_widths, strict=True)):
            margin = margin_from_norm(norm)
            if len(margin) != width:
                raise UserError(
                    f"OFD: a teacher stage has {width} channels, but the batch norm that "
                    f"get_bn_before_relu() gives for it has {len(margin)}"
                )
            self.register_buffer(f"margin{i}", margin.reshape(1, -1, 1, 1), persistent=False)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps = self.connectors(student[self.student_key][-self.depth :])
        t_maps = teacher["preact_feats"][-self.depth :]
        terms = [
            ofd_loss(s_map, t_map, self.get_buffer(f"margin{i}")) * 0.5 ** (self.depth - 1 - i)
            for i, (s_map, t_map) in enumerate(zip(s_maps, t_maps, strict=True))
        ]
        return self.feat_loss_weight * torch.stack(terms).sum()
