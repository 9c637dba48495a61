"""Batches with more items than (image, target, index), for trainers and methods that ask for them.

A trainer asks by what its `train_iter` (or `train_epoch`) takes a batch apart into:

    image, target, index, contrastive_index = data          four items, as for CRD
    (image_weak, image_strong), target, index = data        two views of every image
    image_weak, image_strong, target, index = data          the same, flat

and a method by an argument `contrastive_index` without default of its `forward_train` or `distill`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdistiller.distillers import Distiller
from mdistiller.distillers.helpers.training.negatives import Negatives
from mdistiller.registry import UserError, is_builtin


@dataclass(frozen=True)
class BatchItems:
    """What a run's batches hold.

    Attributes:
        two_views: the image is a pair of views.
        flat: the pair is two items, not one.
        contrast: the last item is `contrastive_index`, [N, K + 1]: a positive, then K negatives.
    """

    two_views: bool = False
    flat: bool = False
    contrast: bool = False


def wanted_items(trainer: type, method: type[Distiller]) -> BatchItems:
    """What a trainer and a method want of a batch.

    Raises:
        UserError: the trainer takes a batch apart into items that no loader gives.
    """
    two_views, flat, contrast = method.two_views, False, _asks_for_contrast(method)
    for tree in _steps(trainer):
        for node in ast.walk(tree):
            two_views |= _hands_over_views(node)
            names = _taken_apart(node)
            if names is None:
                continue
            views = sum(_is_view(name) for name in names[:2]) if names[0] else 2
            rest = len(names) - (views if names[0] else 1)
            if rest > 3 or views < 1:
                raise UserError(
                    f"SOLVER.TRAINER: {trainer.__name__} takes a batch apart into "
                    f"{len(names)} items; batches are (image, target, index), image perhaps two "
                    "views, and contrastive_index where it is asked for"
                )
            two_views |= views == 2
            flat |= views == 2 and bool(names[0])
            contrast |= rest == 3
    return BatchItems(two_views, flat, contrast)


def _asks_for_contrast(method: type[Distiller]) -> bool:
    functions = (method.forward_train, method.distill)
    asked = (inspect.signature(f).parameters.get("contrastive_index") for f in functions)
    return any(p is not None and p.default is p.empty for p in asked)


def _steps(trainer: type) -> Iterator[ast.AST]:
    """The syntax trees of a user's functions that read batches."""
    for name in ("train_iter", "train_epoch"):
        function = getattr(trainer, name, None)
        if not inspect.isfunction(function) or is_builtin(function):
            continue
        try:
            yield ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # made at run time: there is no text to read
            continue


def _taken_apart(node: ast.AST) -> list[str] | None:
    """The names that a statement takes a batch apart into; "" for a pair. None: it does not."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Name):
        return None
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or len(target.elts) < 3:
        return None
    names = [part.id if isinstance(part, ast.Name) else "" for part in target.elts]
    return names if _is_view(names[0]) or not names[0] else None


def _is_view(name: str) -> bool:
    return name.lower().startswith(("image", "img", "input", "x"))


def _hands_over_views(node: ast.AST) -> bool:
    """Whether a statement parts an image into two views, or gives the distiller two."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        names = [getattr(part, "id", "") for part in node.targets[0].elts]
        parted = isinstance(node.value, ast.Name) and _is_view(node.value.id)
        return len(names) == 2 and (parted or all(map(_is_view, names)))
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "distiller":
        return sum(str(word.arg).startswith("image_") for word in node.keywords) == 2
    return False


def with_items(loader: Any, items: BatchItems, cfg: Any) -> Any:
    """The loader of training batches, perhaps with further items.

    The number of negatives and what is a positive are `NCE.K` and `MODE` of the method's node, else
    of CRD's.
    """
    if not (items.flat or items.contrast):
        return loader
    return _ExtendedLoader(loader, items, cfg)


class _ExtendedLoader:
    """A loader whose batches get further items; everything else is that of the loader below."""

    def __init__(self, loader: Any, items: BatchItems, cfg: Any):
        self._loader, self._items, self._draw = loader, items, None
        if items.contrast:
            node = cfg.get(cfg.DISTILLER.TYPE, {})
            node = node if "NCE" in node else cfg.CRD
            self._mode = node.get("MODE", "exact")
            targets = getattr(loader.dataset, "targets", None)
            self._draw = Negatives(targets, len(loader.dataset), node["NCE"]["K"])

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for image, target, index, *rest in self._loader:
            start = tuple(image) if self._items.flat else (image,)
            yield (*start, target, index, *rest, *self._contrast(index))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def _contrast(self, index: Tensor) -> tuple[Tensor, ...]:
        if self._draw is None:
            return ()
        draw = self._draw.to(index.device)
        positive = index if self._mode == "exact" else draw.same_class(index)
        return (torch.cat([positive[:, None], draw.draw(index)], dim=1),)
