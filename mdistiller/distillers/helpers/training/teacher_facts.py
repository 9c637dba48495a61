"""Tensors that a method needs of its frozen teacher and the training images, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.registry import UserError


@dataclass(frozen=True)
class TeacherFact:
    """A tensor made of the teacher's outputs on training images, without augmentation.

    A distiller lists its facts by name in `teacher_facts`; the engine computes each in one pass
    before training, or reads it from a file, and hands it to `take_fact(name, value)`.

    Attributes:
        output: which one: "logits", or the name of a feature of shape [N, D] or [N, D, H, W].
        per_class: images of each class, at most: the first ones of the data set; as many of each
            class as the smallest has.
        reduce: outputs by class, float32 [C, M, D], to the fact; on the training's device.
        recipe: what `reduce` does, with its settings, in words. Files are known by it: another
            text recomputes the fact.
        positions: of a map: at most as many evenly spread positions P of each image, whose vectors
            follow one another: M images give rows of P * D numbers. 0: the whole map, channels
            first.
        by_class: False: `per_class` images in all, evenly spread over the data set whatever their
            classes, as one class (C is 1). So it is without labels.
    """

    output: str
    per_class: int
    reduce: Callable[[Tensor], Tensor]
    recipe: str
    positions: int = 0
    by_class: bool = True


def class_similarity(outputs: Tensor) -> Tensor:
    """Linear CKA of every two classes' outputs: [C, C], 1 on the diagonal.

    With X_c the centred outputs of class c, [M, D], and G_c = X_c X_c^T their products,
    ||X_d^T X_c||^2 = <G_c, G_d>: the similarity is the cosine of G_c and G_d. The m-th image of a
    class is compared with the m-th of another, so the value depends on the images' order. A class
    whose outputs are all the same is similar to no other.

    Args:
        outputs: [C, M, D].
    """
    rows = outputs.double()
    rows = rows - rows.mean(dim=1, keepdim=True)
    rows = rows / rows.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    classes, count, _ = rows.shape
    products = rows.new_zeros(classes, classes)
    for start in range(0, count, _BLOCK):  # rows of all G_c; those of all classes fit no memory
        block = (rows[:, start : start + _BLOCK] @ rows.mT).flatten(1)
        products += block @ block.T
    norms = products.diagonal().sqrt()
    norms = norms.masked_fill(norms == 0, torch.inf)
    similarity = (products / norms[:, None] / norms).clamp(0, 1)
    return ((similarity + similarity.T) / 2).fill_diagonal_(1).to(outputs.dtype)


_BLOCK = 64


def missing_fact(method: str, name: str) -> UserError:
    """The error for a fact that was not supplied."""
    return UserError(
        f"{method} needs {name} of its teacher and the training images, which was not computed: "
        "build it by mdistiller.run.build.build_distiller, or hand it over by "
        f"take_fact({name!r}, value)"
    )
