"""DISTILLER.*_ARGS and *_NORM: released weights, and the preprocessing that fits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mdistiller.config.values import read_statistics
from mdistiller.models import ModelEntry
from mdistiller.preprocessing import Preprocessing, Statistics, read_preprocessing
from mdistiller.registry import UserError

PRETRAINED: Literal["pretrained"] = "pretrained"
"""In place of a file: the weights that the network's own library releases."""


def arguments(cfg: Any, role: str) -> dict[str, Any]:
    """DISTILLER.{role}_ARGS as plain values."""

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    arguments: dict[str, Any] = plain(cfg.DISTILLER[f"{role}_ARGS"])
    return arguments


def require_classes(entry: ModelEntry, settings: Mapping[str, Any], num_classes: int) -> None:
    """Refuse released weights with another number of classes, if their classifier is to be used."""
    facts = entry.pretrained_on(settings)
    if facts and facts.classes != num_classes:
        name = entry.constructor.__name__
        raise UserError(
            f"the released weights of {name} are for {facts.classes} classes, but "
            f"{num_classes} are wanted: train it on the data first, as DISTILLER.STUDENT with "
            "STUDENT_ARGS {pretrained: True}, and name that run's file in DISTILLER.TEACHER_CKPT "
            "(or its config in TEACHER_CFG)"
        )


def own_preprocessing(
    cfg: Any,
    role: str,
    entry: ModelEntry,
    weights: str | Path | None,
    stated: Mapping[str, Any] | None = None,
) -> Preprocessing | None:
    """The preprocessing of the network in a role, as far as it differs from the data's.

    DISTILLER.{role}_NORM gives mean and std; "auto" means what the file of its weights says, else
    "own" for a network that is or was trained from released weights, or whose weights are a plain
    state dict for another library's architecture. Size, resizing, crop and interpolation are those
    that the file records; else the library's for "own", unless the network was trained here.

    Args:
        weights: what it is built with, see `build_network`.
        stated: what `load_network` found in the file, if the weights are from one.

    Raises:
        UserError: mean and std are requested but unknown, or the file records other ones.
    """
    data, recorded_norm = (stated or {}).get("data"), (stated or {}).get("norm")
    recorded = recorded_preprocessing(data, weights)
    norm = cfg.DISTILLER[f"{role}_NORM"]
    preprocessing = _of_release(cfg, role, entry, weights, stated)
    trained_here = not weights or not _is_silent(stated) or in_run_folder(weights)
    rest = recorded or (Preprocessing() if trained_here or preprocessing is None else preprocessing)
    if norm == "data":
        return replace(rest, mean=(), std=())
    if not isinstance(norm, str):
        statistics = norm
    elif norm == "auto" and recorded_norm is not None:
        statistics = _recorded_statistics(recorded_norm, role, weights)
    elif preprocessing is not None:
        statistics = preprocessing.mean, preprocessing.std
    else:
        return recorded
    mean, std = map(tuple, statistics)
    return replace(rest, mean=mean, std=std)


def _of_release(
    cfg: Any, role: str, entry: ModelEntry, weights: str | Path | None, stated: Any
) -> Preprocessing | None:
    """The preprocessing of released weights, where the network is from those or NORM is own."""
    norm, settings = cfg.DISTILLER[f"{role}_NORM"], arguments(cfg, role)
    released = settings.get("pretrained") or weights == PRETRAINED
    if weights and not released and (stated or {}).get("norm") is None:
        released = entry.is_release(weights) or states_nothing(entry, weights, stated)
    if not released and norm != "own":
        return None
    preprocessing = entry.preprocessing(settings, weights or "")
    if norm == "own" and preprocessing is None:
        raise UserError(
            f"DISTILLER.{role}_NORM own: {cfg.DISTILLER[role]} has no released weights that say "
            "how their images were normalised; give [[mean], [std]], or data"
        )
    return preprocessing


def _recorded_statistics(norm: Any, role: str, weights: str | Path | None) -> Any:
    """Mean and std that a checkpoint records."""
    statistics = read_statistics(norm)
    if statistics is None:
        raise UserError(
            f"checkpoint {weights} says that its images were normalised by {norm!r}, which is not "
            f"[[mean], [std]]; set DISTILLER.{role}_NORM to these two, or to data"
        )
    return statistics


def statistics_of(cfg: Any, role: str, how: Preprocessing | None, given: Statistics) -> Statistics:
    """Mean and std of a network's preprocessing, if they have as many channels as those of the
    data, `given`; else these.

    A network whose weights were released for RGB has no others for grey images.

    Raises:
        UserError: the config gives a mean and std for other channels.
    """
    if how is None or not how.mean:
        return given
    if len(given[0]) in (0, len(how.mean)):
        return how.mean, how.std
    if not isinstance(cfg.DISTILLER[f"{role}_NORM"], str):
        raise UserError(
            f"DISTILLER.{role}_NORM has {len(how.mean)} values, and images have {len(given[0])} "
            "channels (DATASET.CHANNELS): give one for each"
        )
    return given


def recorded_preprocessing(data: Any, weights: str | Path | None) -> Preprocessing | None:
    """Resizing, crop and interpolation as a checkpoint or a run records them.

    Args:
        weights: for errors.
    """
    entry = data.get("preprocessing") if isinstance(data, Mapping) else None
    try:
        return read_preprocessing(entry)
    except ValueError as error:
        raise UserError(
            f"checkpoint {weights} records a preprocessing that cannot be meant ({error})"
        ) from None


def _is_silent(stated: Mapping[str, Any] | None) -> bool:
    """Whether a file records no preprocessing."""
    if stated is None or stated.get("norm") is None:
        data = (stated or {}).get("data")
        return not (isinstance(data, Mapping) and "preprocessing" in data)
    return False


def states_nothing(
    entry: ModelEntry, weights: str | Path | None, stated: Mapping[str, Any] | None
) -> bool:
    """Whether weights are a plain state dict for another library's architecture.

    A file in a run folder is not: that network was trained by this library, with the data's
    constants.
    """
    if not weights or weights == PRETRAINED or not _is_silent(stated) or not entry.of_library:
        return False
    return not in_run_folder(weights)


def in_run_folder(weights: str | Path) -> bool:
    """Whether a weights file is in a run folder of this library.

    The config has to be of this library: other trainers (with Hydra, say) write a `config.yaml` as
    well.
    """
    if weights == PRETRAINED:
        return False
    try:
        text = (Path(weights).parent / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(line.startswith("DISTILLER:") for line in text.splitlines())


def taken_line(name: str, role: str, how: Preprocessing, weights: str | Path) -> str:
    """A line that names the preprocessing assumed for a file that records none, and how to change
    it.

    Args:
        name: of the network in its library.
        how: the preprocessing; mean and std alone if images are not resized.
    """
    keys = ", and for evaluation DATASET.IMAGE_SIZE, INTERPOLATION, RESIZE, CROP_PCT"
    return (
        f"{weights} does not record how images are prepared; taken from {name.partition('/')[0]} "
        f"for {name}: {how.describe()} (to change it: DISTILLER.{role}_NORM"
        f"{keys if how.resize else ''})"
    )
