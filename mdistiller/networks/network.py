"""Build a single network of a config: its weights, classes and input normalisation."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from mdistiller.console import print_log
from mdistiller.dataset import Data, DataSource, TestData
from mdistiller.models import ModelEntry, get_model_entry
from mdistiller.models.normalize import renormalize_input, resize_input
from mdistiller.networks.class_order import match_classes
from mdistiller.networks.make import check_input, make_network
from mdistiller.networks.released import (
    PRETRAINED,
    arguments,
    own_preprocessing,
    require_classes,
    states_nothing,
    statistics_of,
    taken_line,
)
from mdistiller.networks.start import load_start, student_start
from mdistiller.networks.teacher_images import teacher_image_size
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank_zero_first
from mdistiller.weights import load_network


def build_network(
    cfg: Any,
    role: str,
    data: Data | TestData,
    weights: str | Path | None = None,
    any_head: bool = False,
) -> nn.Module:
    """The network in a role, "STUDENT" or "TEACHER", with its input normalisation.

    Args:
        weights: a file, or PRETRAINED for released ones that must be of the data's classes; "" for
            random ones. By default what fits of DISTILLER.STUDENT_CKPT for a student; else what the
            role's ARGS say: random ones, or with `pretrained` released ones under a classifier for
            the data.
        any_head: the classifier will not be used: weights may be for other classes, or have none.
    """
    name, entry = cfg.DISTILLER[role], model_entry(cfg, role, data)
    settings = arguments(cfg, role)
    backbone = settings.get("num_classes") == 0
    if backbone and data.num_classes and not any_head:
        raise UserError(
            f"DISTILLER.{role}_ARGS {{num_classes: 0}} leaves out the classifier of {name}, which "
            "is needed here: choose a method that reads features alone (docs/foundation.md), or "
            "leave it out"
        )
    wanted = settings.pop("pretrained", False)
    start = student_start(cfg) if role == "STUDENT" and weights is None else None
    weights = start or weights
    if weights == PRETRAINED:
        wanted = wanted or True
        if not any_head:
            require_classes(entry, {**settings, "pretrained": wanted}, data.num_classes)
    elif weights is not None:
        wanted = False
    if wanted:
        settings |= {"pretrained": wanted, "new_head": weights is None or any_head}
    net = _make(cfg, role, data, entry, settings, any_head)
    check_input(net, name, data, backbone)
    stated = None
    if start is not None:
        stated = load_start(cfg, net, start, name, data)
    elif weights and weights != PRETRAINED:
        stated = _load_weights(cfg, role, net, data, weights, any_head)
    _normalize(cfg, role, net, data, entry, weights, stated)
    return net


def _normalize(
    cfg: Any,
    role: str,
    net: nn.Module,
    data: Data | TestData,
    entry: ModelEntry,
    weights: str | Path | None,
    stated: Any,
) -> None:
    """Have a network normalise images as its weights want them."""
    how, given = own_preprocessing(cfg, role, entry, weights, stated), (data.mean, data.std)
    renormalize_input(net, given, statistics_of(cfg, role, how, given))
    if weights and how and states_nothing(entry, weights, stated):
        if data.preprocessing.resize == "keep":
            how = Preprocessing(how.mean, how.std)
        print_log(taken_line(cfg.DISTILLER[role], role, how, weights))


def _load_weights(
    cfg: Any, role: str, net: Any, data: Data | TestData, file: str | Path, any_head: bool
) -> dict[str, Any]:
    """Load a file into the network in a role, its classes in the data's order; its metadata."""
    name, student = cfg.DISTILLER[role], role == "STUDENT"
    stated = load_network(net, file, name, data.num_classes, any_head, any_head, diverged=student)
    if not getattr(net, "untrained_head", False):
        match_classes(cfg, net, file, stated, data, any_head)
    return stated


def _make(
    cfg: Any, role: str, data: Data | TestData, entry: ModelEntry, settings: Any, any_head: bool
) -> Any:
    """The network in a role, which resizes images of another size than its own."""
    own_size = teacher_image_size(cfg) if role == "TEACHER" else None
    size, key = own_size or data.image_size, f"DISTILLER.{role}_ARGS"
    released = settings.get("pretrained")
    with local_rank_zero_first() if released else contextlib.nullcontext():
        net: Any = make_network(entry, data.num_classes, size, settings, key, len(data.mean))
    facts = entry.pretrained_on(settings) if released and any_head else None
    if facts is not None and facts.classes != data.num_classes:
        net.untrained_head = True
    if own_size:
        resize_input(net, own_size)
    elif role == "STUDENT" and getattr(data, "train_size", None) not in (None, size):
        resize_input(net, size)  # training images are made for the teacher
    return net


def model_entry(
    cfg: Any, role: str, data: Data | TestData | DataSource, key: str = ""
) -> ModelEntry:
    """The zoo's entry for the network in a role, "STUDENT" or "TEACHER".

    Args:
        key: of DISTILLER, for errors; by default the role.
    """
    try:
        return get_model_entry(cfg.DISTILLER[role], data.zoo)
    except UserError as error:
        raise UserError(f"DISTILLER.{key or role}: {error}") from None
