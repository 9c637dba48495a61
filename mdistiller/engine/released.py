"""What DISTILLER.*_ARGS and *_NORM say of released weights and of the images that fit them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mdistiller.engine.cfg_values import read_statistics
from mdistiller.models import ModelEntry
from mdistiller.models._input import Statistics
from mdistiller.registry import UserError

PRETRAINED: Literal["pretrained"] = "pretrained"
"""In place of a file: the weights that the network's own library releases."""


def arguments(cfg: Any, role: str) -> dict[str, Any]:
    """DISTILLER.{role}_ARGS as plain values."""

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    found: dict[str, Any] = plain(cfg.DISTILLER[f"{role}_ARGS"])
    return found


def require_classes(entry: ModelEntry, settings: Mapping[str, Any], num_classes: int) -> None:
    """Refuse released weights, to be used as they are, of another number of classes."""
    known = entry.pretrained_on(settings)
    if known and known.classes != num_classes:
        name = entry.constructor.__name__
        raise UserError(
            f"the released weights of {name} are for {known.classes} classes, but "
            f"{num_classes} are wanted: train it on the data first, as DISTILLER.STUDENT with "
            "STUDENT_ARGS {pretrained: True}, and name that run's file in DISTILLER.TEACHER_CKPT "
            "(or its config in TEACHER_CFG)"
        )


def own_statistics(
    cfg: Any,
    role: str,
    entry: ModelEntry,
    weights: str | Path | None,
    given: Statistics,
    stated: Any = None,
) -> Statistics:
    """Mean and std that the network in a role wants its images normalised with.

    DISTILLER.{role}_NORM says so: "data", those of the data; "own", those of its released weights;
    a list of the two; "auto", what the file of its weights says, else "own" for a network that is
    or was trained from released weights.

    Args:
        weights: what it is built with, see `build_network`.
        given: those of the data.
        stated: what `load_network` found in the file, if the weights are from one.

    Raises:
        UserError: they are asked for and not known, or the file states something else.
    """
    norm, settings = cfg.DISTILLER[f"{role}_NORM"], arguments(cfg, role)
    if not isinstance(norm, str):
        return norm[0], norm[1]
    if norm == "auto" and stated is not None:
        found = read_statistics(stated)
        if found is None:
            raise UserError(
                f"checkpoint {weights} says that its images were normalised by {stated!r}, which "
                f"is not [[mean], [std]]; set DISTILLER.{role}_NORM to these two, or to data"
            )
        return found[0], found[1]
    released = settings.get("pretrained") or weights == PRETRAINED
    if norm == "auto" and weights and not released:
        released = entry.is_release(weights)
    known = entry.pretrained_on(settings) if norm == "own" or released else None
    if norm == "own" and known is None:
        raise UserError(
            f"DISTILLER.{role}_NORM own: {cfg.DISTILLER[role]} has no released weights that say "
            "how their images were normalised; give [[mean], [std]], or data"
        )
    return (known.mean, known.std) if known and norm != "data" else given
