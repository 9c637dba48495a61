"""CTKD. Li, Li, Yang, Zhao, Song, Luo, Li, Yang: Curriculum Temperature for Knowledge Distillation,
AAAI 2023, arXiv 2211.16231.

The temperature of KD (BASE "kd") or DKD ("dkd") is learned, against the student: with sigma the
logistic function and a a trained number,

    T    = T_START + T_RANGE * sigma(a)
    loss = KD_WEIGHT * KD(z_student, z_teacher; T), or KD_WEIGHT * (ALPHA * TCKD + BETA * NCKD)

The gradient of a, through T^2 and through both networks' softmax, is multiplied by
-(1 - cos(pi * min(epoch, LOOPS) / LOOPS)) / 2: from almost 0 to -1 in LOOPS epochs (at once for
LOOPS 0), so that a climbs the loss more and more. The networks' gradients stay as they are.

MODE "global": one a. MODE "instance": a of every sample is the output of a small network with
HIDDEN units on the logits of teacher and student, which get no gradient from it; over KD the loss
is then that of the authors' code, with p, q the softened probabilities of teacher and student:

    mean over n of T_n^2 sum_c (p_c + 1e-7) (log(p_c + 1e-7) - log q_c)

The width of that network is unpublished; 64 and its start at a = INIT for every sample are choices.
PARAM_WD is the weight decay of a or the network. The authors' is the student's, 5e-4, which pulls
a to 0 and T to T_START + T_RANGE / 2; with 0 nothing does. T is kept as the metric `temperature`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.logit_losses import dkd_loss, kd_loss
from mdistiller.distillers.helpers.losses.numerics import scale_logits
from mdistiller.distillers.helpers.training.settings import (
    require_one_of,
    require_positive,
    warmup_factor,
)

EPS = 1e-7
"""Added to the teacher's probabilities where every sample has its own temperature."""


def reversal(epoch: int, loops: int) -> float:
    """Factor on the temperature's gradient, 0 down to -1 over the first `loops` epochs (from 1)."""
    if loops <= 0:
        return -1.0
    return -(1 - math.cos(math.pi * min(epoch, loops) / loops)) / 2


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, with its gradient multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def instance_kd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: Tensor, eps: float = EPS
) -> Tensor:
    """KD with a temperature for every sample, a scalar.

    Args:
        logits_student, logits_teacher: [N, C].
        temperature: [N, 1], > 0.
        eps: added to the teacher's probabilities, which are not scaled back to sum 1.
    """
    p = F.softmax(scale_logits(logits_teacher, temperature), dim=1) + eps
    log_q = F.log_softmax(scale_logits(logits_student, temperature), dim=1)
    rows = (p * (p.log() - log_q)).sum(dim=1, keepdim=True)
    return (rows * temperature**2).mean()


class GlobalTemperature(nn.Module):
    """One trained number for all samples."""

    def __init__(self, init: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(init)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.value


class InstanceTemperature(nn.Module):
    """A number for each sample, [N, 1], from the logits of both networks; `init` at first."""

    def __init__(self, classes: int, hidden: int, init: float):
        super().__init__()
        self.hidden = nn.Linear(classes, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, init)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        # Any finite logits: far beyond this bound the gradient's products would overflow.
        logits = [z.detach().clamp(-1e4, 1e4) for z in (teacher, student)]
        value: Tensor = self.out(F.relu(self.hidden(torch.cat(logits, dim=1))))
        return value


@DISTILLERS.register(
    "CTKD",
    config={
        "BASE": "kd",  # or dkd
        "MODE": "global",  # or instance
        "T_START": 1.0,
        "T_RANGE": 20.0,
        "INIT": 1.0,
        "LOOPS": 10,
        "HIDDEN": 64,  # instance
        "PARAM_WD": 0.0005,
        "ALPHA": 1.0,  # dkd
        "BETA": 2.0,  # dkd
        "WARMUP": 0,  # epochs of linear warm-up of the loss
        "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},  # for dkd: 1 and 1
    },
)
class CTKD(Distiller):
    """KD or DKD at a temperature that is trained to make the student's task harder and harder."""

    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher, cfg)
        node = cfg.CTKD
        require_one_of("CTKD.BASE", node.BASE, ("kd", "dkd"))
        require_one_of("CTKD.MODE", node.MODE, ("global", "instance"))
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.node = node
        require_positive("CTKD.T_START", node.T_START)
        require_positive("CTKD.T_RANGE", node.T_RANGE)
        hidden = int(require_positive("CTKD.HIDDEN", node.HIDDEN))
        if node.MODE == "global":
            self.temperature: nn.Module = GlobalTemperature(node.INIT)
        else:
            classes = sum(probe(net, image_size)["logits"][1] for net in (student, teacher))
            self.temperature = InstanceTemperature(classes, hidden, node.INIT)

    def param_groups(self) -> list[dict[str, Any]]:
        params = list(self.temperature.parameters())
        ids = {id(p) for p in params}
        others = [p for p in self.get_learnable_parameters() if id(p) not in ids]
        return [{"params": others}, {"params": params, "weight_decay": self.node.PARAM_WD}]

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        node, epoch = self.node, batch["epoch"]
        logits = student.logits, teacher.logits
        value = scale_gradient(self.temperature(*logits), reversal(epoch, node.LOOPS))
        temperature = node.T_START + node.T_RANGE * value.sigmoid()
        self.metrics = {"temperature": temperature.detach().mean()}
        if node.BASE == "dkd":
            loss = dkd_loss(*logits, target, node.ALPHA, node.BETA, temperature)
        elif node.MODE == "instance":
            loss = instance_kd_loss(*logits, temperature)
        else:
            loss = kd_loss(*logits, temperature)
        return warmup_factor(epoch, node.WARMUP) * node.LOSS.KD_WEIGHT * loss
