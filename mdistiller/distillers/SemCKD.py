"""SEMCKD. Chen, Mei, Zhang, Wang, Feng, Chen: Cross-Layer Distillation with Semantic Calibration,
AAAI 2021, arXiv 2012.03236.

Every student stage s learns from every teacher stage t, by an attention a that is learned from how
samples resemble each other. With F [n, CHW] a stage's flattened maps and G = F F^T its rows of
similarities:

    q_s, k_t = unit(MLP(G_s)), unit(MLP(G_t)),    one MLP a stage: N -> 2 (N/4) -> ReLU -> N/4
    a_nst = softmax over t of q_ns . k_nt / SOFT
    e_nst = mean over C, H, W of (P_st(F_ns) - F_nt)^2
    L = 1 / (n S) * sum_nst a_nst e_nst
    loss = KD_WEIGHT * KD at T + WEIGHT * L

P is 1x1 (to twice the teacher's channels), 3x3 and 1x1 convolution without bias, batch norm and
ReLU between; the larger map of a pair is averaged to the size of the other one first. The stem is
no stage. The attention is trained with the rest.

WEIGHT is 400 in the authors' recipe for CIFAR-100, which its configs have. That is at the edge of
stability for a rate of 0.05: with a teacher whose maps are large (e around 3 at the start, as after
a few epochs on digits, instead of 0.3) training diverged within 20 steps. So 100 is the default.

The input width N of the MLPs is SOLVER.BATCH_SIZE times the number of processes, and the n samples
are those of all processes. The authors leave out the short batch at the end of an epoch. Here it
counts: rows of G are filled up with zeros, as if the missing samples resembled none. (Of n > N,
which several processes can have once an epoch, similarities with the first N count.) Attention and
value are so the same for any number of processes, up to the batch norms in P, whose statistics are
each process's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.features.stages import match_size
from mdistiller.distillers.helpers.losses.logit_losses import kd_loss
from mdistiller.distillers.helpers.losses.numerics import full_precision, gram, unit
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError
from mdistiller.runtime import world_size

Maps = Sequence[Tensor]


def layer_errors(student: Maps, teacher: Maps) -> Tensor:
    """e [n, P]: mean squared difference of P pairs of maps [n, C, H, W], for each sample.

    Args:
        student: projected maps.
        teacher: what they are compared with.
    """
    pairs = zip(full_precision(student), full_precision(teacher), strict=True)
    return torch.stack([(s - t).square().flatten(1).mean(dim=1) for s, t in pairs], dim=1)


def semckd_loss(errors: Tensor, attention: Tensor) -> Tensor:
    """L, a scalar, from e and a, both [n, S, K]."""
    return (attention * errors).sum(dim=2).mean()


def projector(inputs: int, outputs: int) -> nn.Sequential:
    """P: from a student stage's channels to a teacher stage's."""
    hidden = 2 * outputs
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, outputs, 1, bias=False),
    )


class Embedding(nn.Module):
    """Unit vectors [n, max(N // 4, 1)] from the similarities of samples [n, ...].

    Args:
        width: N, how many similarities a sample has.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width, dim = width, max(width // 4, 1)
        self.layers = nn.Sequential(nn.Linear(width, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, features: Tensor) -> Tensor:
        similarities = gram(features.flatten(1))
        # fills up with zeros, or cuts off where there are more than `width`
        similarities = F.pad(similarities, (0, self.width - len(similarities)))
        return unit(self.layers(similarities))


class Attention(nn.Module):
    """a [n, S, K] from the maps of S student and K teacher stages.

    Args:
        width: N.
        soft: divisor of the scalar products.
    """

    def __init__(self, width: int, s_count: int, t_count: int, soft: float):
        super().__init__()
        self.soft = soft
        self.queries, self.keys = (
            nn.ModuleList(Embedding(width) for _ in range(count)) for count in (s_count, t_count)
        )

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        queries, keys = (
            torch.stack([embed(x) for embed, x in zip(nets, maps, strict=True)], dim=1)
            for nets, maps in ((self.queries, student), (self.keys, teacher))
        )
        return (queries @ keys.mT / self.soft).softmax(dim=2)


@DISTILLERS.register(
    "SEMCKD",
    config={"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0, "T": 4.0, "WEIGHT": 100.0, "SOFT": 1.0},
)
class SemCKD(Distiller):
    """All student stages learn from all teacher stages, by learned attention; and soft targets."""

    relates_images = True
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        node = cfg.SEMCKD
        self.ce_loss_weight, self.kd_weight, self.weight = (
            node.CE_WEIGHT,
            node.KD_WEIGHT,
            node.WEIGHT,
        )
        self.temperature = require_positive("SEMCKD.T", node.T)
        s_widths, t_widths = (
            [shape[1] for shape in probe(net, image_size)["feats"][1:]]
            for net in (student, teacher)
        )
        if not s_widths or not t_widths:
            raise UserError("SEMCKD needs at least one stage after the stem in both networks")
        self.attention = Attention(
            cfg.SOLVER.BATCH_SIZE * world_size(),
            len(s_widths),
            len(t_widths),
            require_positive("SEMCKD.SOFT", node.SOFT),
        )
        self.projectors = nn.ModuleList(projector(s, t) for s in s_widths for t in t_widths)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps, t_maps = student["feats"][1:], teacher["feats"][1:]
        all_maps = gather_batch(*s_maps, *t_maps)
        attention = self.attention(all_maps[: len(s_maps)], all_maps[len(s_maps) :])
        (errors,) = gather_batch(self.errors(s_maps, t_maps))
        kd = kd_loss(student.logits, teacher.logits, self.temperature)
        return self.kd_weight * kd + self.weight * semckd_loss(errors, attention)

    def errors(self, s_maps: Maps, t_maps: Maps) -> Tensor:
        """e [n, S, K] of the process's own samples."""
        pairs = [match_size(s, t) for s in s_maps for t in t_maps]
        projected = [project(s) for project, (s, _) in zip(self.projectors, pairs, strict=True)]
        return layer_errors(projected, [t for _, t in pairs]).unflatten(1, (len(s_maps), -1))
