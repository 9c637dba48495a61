"""Numbers that papers report, and how a run's protocol differs from theirs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mdistiller.engine.cfg import load_config
from mdistiller.engine.cfg_files import read_yaml
from mdistiller.engine.cfg_values import flatten, lookup
from mdistiller.runtime import config_root, results_root


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
    standardised = _standardised(config)
    base = str(config.get("SDD.BASE", "")).upper()
    return [
        line
        for line in published()
        if (line.dataset, line.type, line.teacher, line.student) == wanted
        and line.method.startswith("LSKD-") == standardised
        and (method != "SDD" or line.method == f"SD-{base}")
    ]


def departures(config: Mapping[str, Any], line: Published, processes: int = 1) -> list[str]:
    """How a run was not trained and selected as the published one was.

    Rates, decay and the method's settings are compared with those of the config shipped for it.
    """
    theirs: dict[str, Any] = {"SOLVER.EPOCHS": 240, "images a step": 64}
    if line.source.startswith("Knowledge-Distillation-Zoo"):
        theirs = {"SOLVER.EPOCHS": 200, "images a step": 128}
    elif line.dataset == "imagenet":
        theirs = {"SOLVER.EPOCHS": 100}
    elif line.teacher:
        theirs |= _shipped(line, _standardised(config), config.get("SDD.BASE"))
    images = config.get("SOLVER.BATCH_SIZE", 0) * config.get("SOLVER.ACCUMULATE", 1) * processes
    ours = {**config, "images a step": images}
    found = [
        f"{_word(key)} {ours[key]} instead of {value}"
        for key, value in theirs.items()
        if key in ours and ours[key] != value
    ]
    held_out = config.get("DATASET.VAL_SPLIT", 0)
    if held_out:
        found.append(
            f"{held_out} training images held out to select the epoch; published: the test set"
        )
    return found


def _word(key: str) -> str:
    return key.removeprefix("SOLVER.").lower() if key.startswith("SOLVER.") else key


def _standardised(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("LSKD.ENABLE", "EXPERIMENT.LOGIT_STAND"))


_STEP = (
    *("LR", "SCHEDULE", "LR_DECAY_STAGES", "LR_DECAY_RATE", "WARMUP_EPOCHS", "WEIGHT_DECAY"),
    *("NORM_DECAY", "MOMENTUM", "NESTEROV", "TYPE", "CLIP_GRAD_NORM"),
)


@lru_cache
def _shipped(line: Published, standardised: bool, base: str | None) -> dict[str, Any]:
    """What steps are made of in the config for a published line; empty if there is none."""
    wanted = {"TYPE": line.type, "TEACHER": line.teacher, "STUDENT": line.student}
    keys = tuple(f"SOLVER.{key}" for key in _STEP)
    for file in sorted((config_root() / line.dataset).rglob("*.yaml")):
        if line.type.lower() not in file.relative_to(config_root()).parts:
            continue
        named = read_yaml(file).get("DISTILLER", {})
        if any(named.get(key) != value for key, value in wanted.items()):
            continue
        cfg = load_config(file)
        whole = {key: lookup(cfg, key) for key in flatten(cfg)}
        if _standardised(whole) == standardised and base in (None, whole["SDD.BASE"]):
            return {k: v for k, v in whole.items() if k in keys or k.startswith(f"{line.type}.")}
    return {}
