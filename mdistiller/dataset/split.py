"""Split held-out images from a training set."""

from __future__ import annotations

import torch
from torch import Tensor


def hold_out(targets: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stratified split of the positions of a set.

    Every class contributes in proportion, rounded so that the total is exact (largest remainders
    first), and keeps at least one image.

    Args:
        targets: class indices, int64, [N].
        num: number of images to hold out.
        seed: of the random choice.

    Returns:
        Sorted positions kept, [N - num], and held out, [num].

    Raises:
        ValueError: `num` is negative, or a class would lose all images.
    """
    classes, counts = targets.unique(return_counts=True)
    most = len(targets) - len(classes)
    if not 0 <= num <= most:
        raise ValueError(f"can hold out 0 to {most} of these images, not {num}")
    quotas = _quotas(counts.tolist(), num)
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(targets), dtype=torch.bool)
    for label, quota in zip(classes.tolist(), quotas, strict=True):
        members = (targets == label).nonzero().squeeze(1)
        held[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def _quotas(counts: list[int], num: int) -> list[int]:
    """`num` divided in proportion to `counts`, each part below its count."""
    total = sum(counts)
    quotas = [count * num // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: -(counts[i] * num % total))
    while missing := num - sum(quotas):
        for i in [i for i in by_remainder if quotas[i] < counts[i] - 1][:missing]:
            quotas[i] += 1
    return quotas
