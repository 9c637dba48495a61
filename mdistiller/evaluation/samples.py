"""A choice of test images, and what networks make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdistiller.console import progress
from mdistiller.dataset import TestData
from mdistiller.evaluation.subjects import Subject, side_by_side
from mdistiller.registry import UserError, suggest

Read = Callable[[Tensor, Mapping[str, Any]], Tensor]


def choose_classes(classes: Sequence[str], wanted: Sequence[str], most: int) -> list[int]:
    """Indices of the classes with these names or numbers; the first `most` if none are named.

    Raises:
        UserError: a name is not a class.
    """
    if not wanted:
        return list(range(min(len(classes), most)))
    labels = []
    for name in wanted:
        if name in classes:
            labels.append(list(classes).index(name))
        elif name.isdecimal() and int(name) < len(classes):
            labels.append(int(name))
        else:
            raise UserError(
                f"--classes: unknown class {name!r}{suggest(name, classes)} (classes have "
                f"names and numbers from 0 to {len(classes) - 1})"
            )
    return list(dict.fromkeys(labels))


def choose_images(
    targets: Tensor, classes: Sequence[int], count: int = 0, seed: int = 0
) -> list[int]:
    """Positions of `count` images of these classes in order, about the same number of each.

    Args:
        targets: [N] classes of all images.
        count: 0 means all of the classes' images.
        seed: decides which.

    Raises:
        UserError: the classes have no images.
    """
    draw = torch.Generator().manual_seed(seed)
    targets = targets.cpu()
    piles = []
    for k in classes:
        there = (targets == k).nonzero().flatten()
        piles.append(there[torch.randperm(len(there), generator=draw)].tolist())
    deepest = max(map(len, piles), default=0)
    if not deepest:
        raise UserError("--classes: the test set has no images of these")
    # round by round, one of each class
    dealt = [pile[i] for i in range(deepest) for pile in piles if i < len(pile)]
    return sorted(dealt[: count or None])


def batches(
    test: TestData, positions: Sequence[int], subjects: Sequence[Subject] = ()
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Images and targets at these positions of the test set, in its order.

    Returns:
        Images [B, 3, H, W] as of `test`, targets [B], and the images that each subject gets.
    """
    start, wanted = 0, sorted(positions)
    for views, batch in side_by_side(subjects, progress(test.loader, "images")):
        image, target = batch[:2]
        here = [p - start for p in wanted if start <= p < start + len(target)]
        start += len(target)
        if here:
            index = torch.tensor(here, device=target.device)
            shown, *views = (view[index.to(view.device)] for view in (image, *views))
            yield shown, target[index], views
        if not wanted or start > wanted[-1]:
            return


@torch.inference_mode()
def collect(
    subjects: Sequence[Subject],
    test: TestData,
    positions: Sequence[int],
    device: torch.device,
    read: Read,
) -> tuple[list[Tensor], Tensor]:
    """What `read(logits, features)` gives for these images, for each network, on the CPU.

    Returns:
        One tensor [N, ...] for each network, and the targets [N].
    """
    tensors: list[list[Tensor]] = [[] for _ in subjects]
    targets = []
    for _, target, images in batches(test, positions, subjects):
        for subject, image, parts in zip(subjects, images, tensors, strict=True):
            parts.append(read(*subject.net(image.to(device, non_blocking=True))).float())
        targets.append(target)
    return [torch.cat(parts).cpu() for parts in tensors], torch.cat(targets).cpu()


def embedding(logits: Tensor, features: Mapping[str, Any]) -> Tensor:
    """The pooled feature [N, d], for :func:`collect`."""
    if "pooled_feat" not in features:
        raise UserError("the network returns no 'pooled_feat', which this picture is of")
    pooled: Tensor = features["pooled_feat"]
    return pooled


def logits_of(classes: Sequence[int]) -> Read:
    """For :func:`collect`, the logits of some classes."""
    return lambda logits, features: logits[:, list(classes)]
