"""Reading and checking of a method's config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdistiller.registry import UserError


def warmup_factor(epoch: int, warmup: int) -> float:
    """Linear warm-up of a loss weight: min(epoch / warmup, 1), epochs counted from 1."""
    return min(epoch / warmup, 1.0) if warmup > 0 else 1.0


def require_positive(key: str, value: float) -> float:
    """`value` if it is above zero; the error names the config key."""
    if not value > 0:
        raise UserError(f"{key} must be positive, got {value}")
    return value


def require_one_of(key: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is among `allowed`; the error names the config key."""
    if value not in allowed:
        raise UserError(f"{key} {value!r} is not one of {', '.join(allowed)}")
    return value


def resolve_setting(key: str, value: Any, default: Any, needed: Any) -> Any:
    """Check a setting that the networks determine, and return the value they need.

    Raises:
        UserError: `value` is neither `needed` nor the default, so the config asks for another one.
    """
    if isinstance(needed, (list, tuple)):
        value, default, needed = list(value), list(default), list(needed)
    if value not in (needed, default):
        raise UserError(
            f"{key} is {value}, but these networks need {needed}; set that, or leave the key out"
        )
    return needed


def probe_size(
    method: str, cfg: Any, default: Sequence[int], image_size: Sequence[int] | None
) -> Sequence[int]:
    """(height, width) of the images: `image_size`, or what the method's INPUT_SIZE says."""
    if image_size is None:
        return cfg[method].INPUT_SIZE
    return resolve_setting(f"{method}.INPUT_SIZE", cfg[method].INPUT_SIZE, default, image_size)
