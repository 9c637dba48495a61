"""What pictures show: t-SNE of features, correlation of logits, attention maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller.registry import UserError


def tsne(features: Tensor, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """Points [N, 2] whose neighbours are those of the features [N, d]; scikit-learn's.

    Args:
        perplexity: about how many neighbours count; lowered to (N - 1) / 3 for few samples.

    Raises:
        UserError: there are fewer than four samples, or features are not finite.
    """
    from sklearn.manifold import TSNE

    count = len(features)
    if count < 4:
        raise UserError(f"t-SNE needs at least 4 images, got {count}")
    if not torch.isfinite(features).all():
        raise UserError("t-SNE needs finite features, and this network's are not")
    model = TSNE(
        init="pca" if min(features.shape) > 1 else "random",
        perplexity=min(perplexity, (count - 1) / 3),
        random_state=seed,
    )
    points: np.ndarray = model.fit_transform(features.numpy())
    return points


def logit_correlation(logits: Tensor) -> Tensor:
    """Pearson correlation of the classes' logits over samples: [N, C] to [C, C].

    A class whose logit is constant is correlated with none: 0, and 1 with itself.
    """
    centred = logits.double() - logits.double().mean(dim=0)
    length = torch.linalg.vector_norm(centred, dim=0)
    flat = length <= 1e-12 * (1 + logits.double().abs().amax(dim=0))
    unit = centred / length.masked_fill(flat, torch.inf)
    return (unit.T @ unit).clamp(-1, 1).fill_diagonal_(1)


def attention_maps(features: Mapping[str, Any]) -> list[Tensor]:
    """For each stage after the stem the mean over channels of its squared output: [N, h, w].

    This is what attention transfer (1612.03928) compares.
    """
    if "feats" not in features:
        raise UserError("the network returns no 'feats', which attention maps are of")
    return [feat.float().square().mean(dim=1) for feat in features["feats"][1:]]
