"""Match the class order of a weights file with that of the data.

A weights file records the class names of its outputs. If they are the data's classes in another
order, the rows of the classifier are permuted into the data's order, so that every method, also one
that reads the classifier, sees a network for these data. Other classes are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.console import print_log
from mdistiller.dataset import are_numbers, first_difference, natural_key
from mdistiller.distillers.helpers.features.shapes import preserve_state
from mdistiller.preprocessing import input_channels
from mdistiller.registry import UserError
from mdistiller.weights import FEATURES_ONLY, split_key

_ENOUGH = 10  # images of a class from which on they tell what it is taken for


def match_classes(
    cfg: Any,
    net: Any,
    weights: str | Path,
    stated: Mapping[str, Any],
    data: Any,
    any_head: bool = False,
) -> None:
    """Permute the outputs of a network loaded from a file into the data's class order.

    Args:
        net: on the CPU; the rows of its classifier are permuted in place.
        weights, stated: the file, and what `load_network` returned of it.
        data: with `classes` (names by number; empty: not known) and `image_size`.
        any_head: the outputs will not be used: a network for other classes is accepted, and marked
            by `untrained_head`.

    Raises:
        UserError: the file is for other classes, or the network's outputs cannot be reordered.
    """
    ours, theirs = list(data.classes), stated_classes(weights, stated)
    if not ours or ours == theirs or not cfg.DISTILLER.CHECK_CLASSES:
        return
    if theirs is None:
        if stated.get("norm") is None and not cfg.DATASET.CLASSES:
            _warn_of_natural_order(weights, ours)
        return
    difference, same = first_difference(ours, theirs), sorted(ours) == sorted(theirs)
    if not same and (are_numbers(ours) or are_numbers(theirs)):  # one of the two has no names
        return
    if same and reorder_outputs(net, torch.tensor(list(map(theirs.index, ours))), data.image_size):
        print_log(f"{weights} numbers the classes in another order ({difference}): mapped by name")
    elif any_head:
        net.untrained_head = True
    elif same:
        raise UserError(
            f"{weights} numbers the classes in another order ({difference}), and the outputs of a "
            f"{type(net).__name__} cannot be reordered: give DATASET.CLASSES the file's order"
        )
    else:
        raise UserError(
            f"{weights} is of a network for other classes: {difference}; {FEATURES_ONLY}; name "
            "another file, or, if the classes are the same by other names, set "
            "DISTILLER.CHECK_CLASSES False"
        )


def stated_classes(weights: str | Path, stated: Mapping[str, Any]) -> list[str] | None:
    """The class names that a weights file records, by number; None if unknown.

    A file without them, in the folder of the run that wrote it, has the classes of that run.
    """
    facts = stated.get("data")
    file, _ = split_key(weights)
    if facts is None and re.fullmatch(r"(student_.+|latest|best|epoch_\d+)", file.name):
        try:
            facts = json.loads(file.with_name("run.json").read_text())["data"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    names = facts.get("classes") if isinstance(facts, Mapping) else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    return None


@torch.no_grad()
def reorder_outputs(net: nn.Module, order: Tensor, image_size: tuple[int, int]) -> bool:
    """Permute a network's outputs: output k becomes the former output order[k].

    Args:
        order: a permutation, int64 [C].
        image_size: (height, width), for the two forwards that check it.

    Returns:
        Whether that was possible; if not, the network is unchanged.
    """
    find = getattr(net, "classifier", None)
    layer = find() if callable(find) else None
    if not isinstance(layer, nn.Linear | nn.Conv2d) or len(layer.weight) != len(order):
        return False
    shape = (2, input_channels(net), *image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    params = [param for param in (layer.weight, layer.bias) if param is not None]
    kept = [param.clone() for param in params]
    with preserve_state(net):
        wanted = net(images)[0][:, order]
        for param, rows in zip(params, kept, strict=True):
            param.copy_(rows[order])
        logits = net(images)[0]
    if logits.shape == wanted.shape and torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5):
        return True
    for param, rows in zip(params, kept, strict=True):
        param.copy_(rows)
    return False


def _warn_of_natural_order(weights: str | Path, ours: Sequence[str]) -> None:
    """Warn if timm numbers the same class folders differently."""
    natural = sorted(ours, key=natural_key)
    if list(ours) != sorted(ours) or natural == list(ours):
        return
    k = next(k for k, (a, b) in enumerate(zip(ours, natural, strict=True)) if a != b)
    print_log(
        f"WARNING: {weights} has no class names. Class {k} is {ours[k]!r} in the data (plain sort) "
        f"and {natural[k]!r} in the natural order of timm: if timm trained the file, set "
        "DATASET.CLASSES natural"
    )


def doubts(
    top1: float, confusion: Tensor | None, targets: Tensor, classes: Sequence[str]
) -> list[str]:
    """Signs that a teacher does not fit the data, as sentences without their subject, its name.

    Args:
        top1: its accuracy in percent.
        confusion: images by class and predicted class, [C, C]; None: not counted.
        targets: of the images, int64 [N].
    """
    lines = []
    guess = 100.0 * targets.bincount().max().item() / max(1, len(targets))
    if top1 <= guess or (top1 < 200.0 / len(classes) and len(classes) > 2):
        lines.append(
            f"is near chance on this data: {top1:.2f} %, and naming the most frequent class has "
            f"{guess:.2f} %; is it the right file?"
        )
    moved = {} if confusion is None else swapped_classes(confusion.cpu())
    if moved:
        pairs = [f"{classes[k]!r} for {classes[other]!r}" for k, other in sorted(moved.items())]
        shown = ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
        lines.append(
            "takes classes for one another, as a file with another order of classes does: "
            f"{shown}; DATASET.CLASSES sets the order (natural: that of timm)"
        )
    return lines


def swapped_classes(confusion: Tensor) -> dict[int, int]:
    """Classes that a network seems to swap: true class -> predicted class; empty if there are none.

    They form a permutation under which each class has at least half of its images, and twice as
    many as without it. A permutation that rests on a few images of a good network is not reported.

    Args:
        confusion: images by class (row) and predicted class, [C, C].
    """
    images, right = confusion.sum(dim=1), confusion.diagonal()
    most, taken_for = confusion.max(dim=1)
    clear = (images > 0) & (most >= 0.5 * images) & (most >= 2 * right)
    clear &= taken_for != torch.arange(len(images))
    moved = {k: int(taken_for[k]) for k in clear.nonzero().flatten().tolist()}
    while set(moved) != (taken := set(moved.values())):  # until what is left is a permutation
        moved = {k: v for k, v in moved.items() if k in taken and v in moved}
    members = list(moved)
    gain = (most - right)[members].sum() / images.sum()
    return moved if members and (gain >= 0.1 or images[members].min() >= _ENOUGH) else {}
