"""Numbers that papers report, and how a run's protocol differs from theirs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mdistiller.runtime import results_root


@dataclass(frozen=True)
class Published:
    """A line of `docs/results/published.csv`; `top1` in %, no teacher: ""."""

    dataset: str
    method: str
    type: str
    teacher: str
    student: str
    top1: float
    source: str
    verified: bool


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    """All lines."""
    with (results_root() / "published.csv").open(newline="", encoding="utf-8") as file:
        return tuple(map(_line, csv.DictReader(file)))


def _line(row: dict[str, Any]) -> Published:
    return Published(**{**row, "top1": float(row["top1"]), "verified": row["verified"] == "yes"})


def beside(config: Mapping[str, Any]) -> list[Published]:
    """What is published for the method, networks and data set of a run."""
    method = config.get("DISTILLER.TYPE", "")
    if config.get("SOLVER.TRAINER") not in ("base", "crd"):  # two names of one
        return []
    alone = method in ("NONE", "USKD")
    wanted = (
        config.get("DATASET.TYPE"),
        method,
        "" if alone else config.get("DISTILLER.TEACHER"),
        config.get("DISTILLER.STUDENT"),
    )
    standardised = any(config.get(key) for key in ("LSKD.ENABLE", "EXPERIMENT.LOGIT_STAND"))
    base = str(config.get("SDD.BASE", "")).upper()
    return [
        line
        for line in published()
        if (line.dataset, line.type, line.teacher, line.student) == wanted
        and line.method.startswith("LSKD-") == standardised
        and (method != "SDD" or line.method == f"SD-{base}")
    ]


def departures(config: Mapping[str, Any], line: Published) -> list[str]:
    """How a run was not trained and selected as the published one was."""
    if line.source.startswith("Knowledge-Distillation-Zoo"):
        theirs = {"SOLVER.EPOCHS": 200, "images a step": 128}
    elif line.dataset == "imagenet":
        theirs = {"SOLVER.EPOCHS": 100}
    else:
        theirs = {"SOLVER.EPOCHS": 240, "images a step": 64}
    images = config.get("SOLVER.BATCH_SIZE", 0) * config.get("SOLVER.ACCUMULATE", 1)
    ours = {**config, "images a step": images}
    found = [
        f"{key.rpartition('.')[2].lower()} {ours[key]} instead of {value}"
        for key, value in theirs.items()
        if ours.get(key) != value
    ]
    held_out = config.get("DATASET.VAL_SPLIT", 0)
    if held_out:
        found.append(
            f"{held_out} training images held out to select the epoch; published: the test set"
        )
    return found
