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


def require_one_of(key: str, value: str, known: Sequence[str]) -> str:
    """`value` if it is among `known`; the error names the config key."""
    if value not in known:
        raise UserError(f"{key} {value!r} is none of {', '.join(known)}")
    return value


def resolve_setting(key: str, value: Any, default: Any, found: Any) -> Any:
    """What to use for a setting that the networks determine: `found`.

    Raises:
        UserError: `value` is neither that nor the default, so somebody meant something else.
    """
    if isinstance(found, (list, tuple)):
        value, default, found = list(value), list(default), list(found)
    if value not in (found, default):
        raise UserError(
            f"{key} is {value}, but these networks need {found}; set that, or leave the key out"
        )
    return found


def probe_size(
    method: str, cfg: Any, default: Sequence[int], image_size: Sequence[int] | None
) -> Sequence[int]:
    """(height, width) of the images: `image_size`, or what the method's INPUT_SIZE says."""
    if image_size is None:
        return cfg[method].INPUT_SIZE
    return resolve_setting(f"{method}.INPUT_SIZE", cfg[method].INPUT_SIZE, default, image_size)
