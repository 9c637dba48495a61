"""How alike two networks' features are (CKA), and how tightly classes cluster (neural collapse).

Both are computed from moments summed over the whole set, so neither the size of the batches nor
their order (image folders come class by class) matters. A map [N, C, H, W] is averaged over its
positions first: d is its number of channels, and d x d matrices fit anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.evaluation.predictions import wide


def pool(feature: Tensor) -> Tensor:
    """A map [N, C, H, W] averaged over positions, [N, C], in the device's widest type."""
    feature = feature.to(wide(feature.device))
    return feature.flatten(2).mean(dim=2) if feature.ndim > 2 else feature


class Hsic:
    """Hilbert-Schmidt independence criterion of linear kernels, unbiased.

    The estimator of Song et al. (JMLR 2012), HSIC_1, of K = X X^T and L = Y Y^T, written in X^T Y
    and other sums over samples, so that no N x N matrix is needed.
    """

    def __init__(self) -> None:
        self.n = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: x [N, d], y [N, e]."""
        u, v = x.square().sum(dim=1), y.square().sum(dim=1)
        new = [x.T @ y, x.sum(0), y.sum(0), v @ x, u @ y, u.sum(), v.sum(), u @ v]
        self.n += len(x)
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new

    def value(self) -> float:
        """The estimate; NaN of fewer than four samples."""
        n = self.n
        if n < 4:
            return float("nan")
        cross, a, b, p, q, u, v, w = self.sums
        same = cross.square().sum() - w  # trace of the product of K and L, diagonals left out
        ends = (a.square().sum() - u) * (b.square().sum() - v)
        middle = a @ cross @ b - a @ p - b @ q + w
        estimate = same + ends / ((n - 1) * (n - 2)) - 2 * middle / (n - 2)
        return (estimate / (n * (n - 3))).item()


class Cka:
    """Linear centred kernel alignment (Kornblith et al., ICML 2019, 1905.00414) of two features.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with unbiased estimates, as in Nguyen et al. (ICLR
    2021, 2010.15327): about 0 for unrelated features also where d is near N, where the usual,
    biased ratio is near 1. It can be a little below 0.
    """

    def __init__(self) -> None:
        self.parts = [Hsic(), Hsic(), Hsic()]
        self.origin: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: maps or vectors of the two networks for the same images."""
        x, y = pool(x), pool(y)
        if self.origin is None:  # any will do; one amid the samples keeps the digits
            self.origin = x.mean(dim=0), y.mean(dim=0)
        x, y = x - self.origin[0], y - self.origin[1]
        for part, pair in zip(self.parts, ((x, y), (x, x), (y, y)), strict=True):
            part.add(*pair)

    def value(self) -> float:
        """Up to 1; NaN if a feature is constant or there are fewer than four samples."""
        both, first, second = (part.value() for part in self.parts)
        return both / (first * second) ** 0.5 if min(first, second) > 0 else float("nan")


@dataclass(frozen=True)
class Collapse:
    """How near features are to neural collapse (Papyan et al., PNAS 2020, 2008.08186).

    With W the covariance within classes and B that of the class means about their mean:

    Attributes:
        within, between: traces of W and B.
        nc1: trace(W B^+) / C; 0 when every class has collapsed to its mean.
        norm_spread: standard deviation over mean of the lengths of the centred class means; 0 when
            all are equally far from the centre.
    """

    within: float
    between: float
    nc1: float
    norm_spread: float


class CollapseSums:
    """Sums over batches that make a :class:`Collapse`. Classes without images count for nothing."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.origin: Tensor | None = None

    def add(self, feature: Tensor, target: Tensor) -> None:
        """Add a batch: maps or vectors, and target [N] class indices."""
        x = pool(feature)
        if self.origin is None:
            self.origin = x.mean(dim=0)
            self.square = x.new_zeros(x.shape[1], x.shape[1])
            self.sums = x.new_zeros(self.num_classes, x.shape[1])
            self.counts = x.new_zeros(self.num_classes)
        x = x - self.origin
        self.square += x.T @ x
        self.sums.index_add_(0, target, x)
        self.counts.index_add_(0, target, torch.ones_like(target, dtype=x.dtype))

    def result(self) -> Collapse:
        """The measures; at least one batch must have been added."""
        counts, sums, square = (v.cpu().double() for v in (self.counts, self.sums, self.square))
        there = counts > 0
        counts, means = counts[there], sums[there] / counts[there, None]
        within = (square - (means.T * counts) @ means) / counts.sum()
        means = means - means.mean(dim=0)
        classes = len(means)
        if not torch.isfinite(within).all() or classes < 2:
            return Collapse(*[float("nan")] * 4)
        # B = M^T M / C, so B^+ = C M^+ M^+^T, and the factor C leaves with the division by C
        inverse = torch.linalg.pinv(means)
        lengths = torch.linalg.vector_norm(means, dim=1)
        return Collapse(
            within=within.trace().item(),
            between=means.square().sum().item() / classes,
            nc1=(inverse * (within @ inverse)).sum().item(),
            norm_spread=(lengths.std(correction=0) / lengths.mean()).item(),
        )
