"""LSKD. Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024,
arXiv 2403.01427: not a method but a change to the logits that methods compare.

For the logits x of a sample over C classes, of student and teacher alike,

    Z(x) = (x - mean x) / (std x + EPS)

takes the place of x in the distillation loss; the cross-entropy keeps x. Gradient flows through
mean and std; it is orthogonal to x and inversely proportional to std x, which is why published
weights are 9 and more. UNBIASED: the authors' code divides the squares by C - 1, the paper's
algorithm by C, and without EPS. Where a sample's logits are constant up to rounding, Z is 0 and has
no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mdistiller.distillers.helpers.losses.numerics import centre, scale_logits

LSKD_CONFIG: dict[str, Any] = {"ENABLE": False, "UNBIASED": True, "EPS": 1e-7}


def standardize(logits: Tensor, unbiased: bool = True, eps: float = 1e-7) -> Tensor:
    """Z of logits [N, C, ...] over dimension 1, the same shape.

    Args:
        unbiased: divide the sum of squares by C - 1, else by C.
        eps: added to the standard deviation, >= 0.
    """
    centred = centre(scale_logits(logits, 1.0), dim=1)
    # Squares of 1e30 would overflow; Z does not depend on the scale, so neither does its gradient.
    scale = centred.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    centred = centred / scale
    count = max(logits.shape[1] - int(unbiased), 1)
    std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(count)
    return centred / (std.masked_fill(std == 0, 1.0) + eps / scale)


def lskd_settings(cfg: Any) -> dict[str, Any] | None:
    """Keyword arguments of :func:`standardize` if the config switches it on, else None.

    EXPERIMENT.LOGIT_STAND is the switch's name in the authors' fork.
    """
    node = getattr(cfg, "LSKD", None)
    if node is None or not (node.ENABLE or cfg.EXPERIMENT.LOGIT_STAND):
        return None
    return {"unbiased": node.UNBIASED, "eps": node.EPS}
