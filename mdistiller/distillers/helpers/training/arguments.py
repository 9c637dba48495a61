"""How the arguments of a training step are matched to those that a method's function takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdistiller.registry import UserError


def view_names(forward_train: Callable[..., Any]) -> tuple[str, str] | None:
    """The arguments of a `forward_train` that take the weak and the strong view; None: no views.

    They are its two arguments that begin with `image_` (or `image` and one such), in order; a
    name such as `image_s` or `image_strong` before one such as `image_w` is the strong one.
    """
    names = [name for name in inspect.signature(forward_train).parameters if name != "image_size"]
    views = [name for name in names if name.startswith("image_")]
    if len(views) == 1 and "image" in names:
        views.insert(0, "image")
    if len(views) != 2:
        return None
    first, second = views
    swapped = first.startswith("image_s") and second.startswith(("image_w", "image_o"))
    return (second, first) if swapped else (first, second)


@dataclass(frozen=True)
class StepArguments:
    """The arguments of a `forward_train`.

    Attributes:
        accepted: their names; None if it takes any.
        required: names of those without a default.
        views: names under which the weak and the strong view are passed.
    """

    accepted: frozenset[str] | None
    required: frozenset[str]
    views: tuple[str, str]

    @classmethod
    def of(cls, forward_train: Callable[..., Any]) -> StepArguments:
        """Read them from the function's signature."""
        parameters = inspect.signature(forward_train).parameters.values()
        kinds = {p.kind for p in parameters}
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = (p.name for p in parameters if p.default is p.empty and p.kind not in variable)
        return cls(
            None
            if inspect.Parameter.VAR_KEYWORD in kinds
            else frozenset(p.name for p in parameters),
            frozenset(required),
            view_names(forward_train) or ("image_weak", "image_strong"),
        )


def missing_arguments(
    method: object, required: frozenset[str], given: Mapping[str, Any]
) -> UserError:
    """The error for a `forward_train` whose required arguments the trainer does not pass."""
    missing = ", ".join(sorted(required - given.keys()))
    return UserError(
        f"{type(method).__name__}.forward_train needs {missing}, but the trainer gives it "
        f"{', '.join(given)}: set SOLVER.TRAINER to one that belongs to this method"
    )
