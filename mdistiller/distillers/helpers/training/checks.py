"""Checks of how a method is constructed, and of what networks and methods return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import UserError


def require_call(method: type, arguments: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """Refuse a method whose constructor cannot be called.

    Args:
        arguments: student, teacher and config; for a method without a teacher the student alone.
        facts: further arguments that this constructor names.
    """
    try:
        inspect.signature(method).bind(*arguments, **facts)
    except TypeError as error:
        names = ", ".join(("student", "teacher", "cfg")[: len(arguments)])
        raise UserError(
            f"{method.__name__}.__init__ cannot be called: {error}; it must take (self, {names}), "
            "and may ask for num_data, image_size and targets by name (docs/extend/method.md)"
        ) from None


def logits_and_features(output: Any, net: nn.Module | None) -> tuple[Any, Any]:
    """What a network returned, as (logits, features); a plain classifier has no features.

    Raises:
        UserError: the output is neither logits nor such a pair.
    """
    if isinstance(output, Tensor):
        return output, {}
    if isinstance(output, (tuple, list)) and len(output) == 2:
        return output[0], output[1]
    raise UserError(
        f"network {type(net).__name__} returned {_described(output)}, but methods read logits or "
        "(logits, features): wrap it by mdistiller.models.as_staged(net, name, (height, width)) "
        "(docs/extend/own_backbone.md)"
    )


def teacher_view(image: Any, method: object) -> Tensor:
    """The view of a batch's images for the teacher, [N, 3, H, W], which the loader attached.

    Raises:
        UserError: the method or the trainer has made other images.
    """
    view: Tensor | None = getattr(image, "teacher_view", None)
    if view is None:
        raise UserError(
            f"DISTILLER.TEACHER_AUGMENT weak: {type(method).__name__} or its trainer shows the "
            "teacher images that it has made itself; set it to same"
        )
    return view


def loss_of(method: object, loss: Any, function: str = "distill") -> Tensor:
    """The loss that `distill` of a method, or the named function, returned, checked.

    Raises:
        UserError: it is not a floating-point tensor.
    """
    if isinstance(loss, Tensor) and loss.is_floating_point():
        return loss
    raise UserError(
        f"{type(method).__name__}.{function} returned {_described(loss)}; "
        "it must return the loss, a scalar tensor"
    )


def step_of(method: object, result: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output and the loss terms that a method's training step returned, checked.

    The output is what the trainer's `measure` reads: logits, or None for a detector.

    Raises:
        UserError: it is not such a pair, or a term is not a floating-point tensor.
    """
    where = f"{type(method).__name__}.forward_train"
    wanted = "it must return (logits, losses), losses a dict from names to scalar tensors"
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise UserError(f"{where} returned {_described(result)}; {wanted}")
    output, losses = result
    if not isinstance(losses, Mapping) or not losses:
        pair = f"({_described(output)}, {_described(losses)})"
        raise UserError(f"{where} returned {pair}; {wanted}")
    learns = not torch.is_grad_enabled()
    for name, loss in losses.items():
        if not (isinstance(loss, Tensor) and loss.is_floating_point()):
            raise UserError(f"{where} returned {_described(loss)} as {name!r}; {wanted}")
        learns |= loss.requires_grad
    if not learns:
        raise UserError(
            f"{where} returned losses without gradient ({', '.join(map(str, losses))}): compute "
            "them from the student's output outside torch.no_grad() and detach()"
        )
    return output, dict(losses)


def logits_of(method: object, output: Any, samples: int) -> Tensor:
    """The logits that a training step of a classification method returned.

    Raises:
        UserError: they are not a tensor [samples, classes].
    """
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == samples:
        return output
    raise UserError(
        f"{type(method).__name__}.forward_train returned {_described(output)} before its losses; "
        f"it must return (logits, losses), logits [N, classes] of the {samples} images"
    )


def metrics_of(method: object, device: torch.device) -> dict[str, Tensor]:
    """The diagnostics of a method's last step, `metrics`, as tensors.

    Raises:
        UserError: one is not a number.
    """
    metrics: Any = getattr(method, "metrics", None) or {}
    tensors = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            value = torch.full((), float(value), device=device)
        if not isinstance(value, Tensor):
            raise UserError(
                f"{type(method).__name__}.metrics[{name!r}] is {_described(value)}; it must be a "
                "number or a detached tensor"
            )
        tensors[name] = value
    return tensors


def _described(value: Any) -> str:
    """A value in a few words, without its contents."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list, dict)):
        size = f"{len(value)} item" + "s" * (len(value) != 1)
        return f"a {type(value).__name__} of {size}"
    return f"a value of type {type(value).__name__}"
