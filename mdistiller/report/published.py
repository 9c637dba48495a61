"""Numbers that papers report, and how a run's protocol differs from theirs."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mdistiller.config.files import read_yaml
from mdistiller.config.values import flatten, lookup
from mdistiller.distillers import DISTILLERS
from mdistiller.engine.cfg import load_config
from mdistiller.run_folder.changes import WITHOUT_EFFECT
from mdistiller.runtime import config_root, results_root


def _alone(method: str) -> bool:
    """Whether a method has no teacher."""
    return method in DISTILLERS and not DISTILLERS[method].uses_teacher


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


def published_for(config: Mapping[str, Any]) -> list[Published]:
    """What is published for the method, networks and data set of a run."""
    method = config.get("DISTILLER.TYPE", "")
    if not _plainly_trained(config):
        return []
    wanted = (
        config.get("DATASET.TYPE"),
        method,
        "" if _alone(method) else config.get("DISTILLER.TEACHER"),
        config.get("DISTILLER.STUDENT"),
    )
    standardised = _standardised(config)
    variant = _variant(config)
    return [
        line
        for line in published()
        if (line.dataset, line.type, line.teacher, line.student) == wanted
        and line.method.startswith("LSKD-") == standardised
        and variant in ("", line.method)
    ]


def departures(config: Mapping[str, Any], line: Published, processes: int = 1) -> list[str]:
    """How a run was not trained and selected as the published one was.

    All settings are compared with those of the config that is shipped for the line.
    """
    theirs, complete = _protocol(config, line)
    images = config.get("SOLVER.BATCH_SIZE", 0) * config.get("SOLVER.ACCUMULATE", 1) * processes
    ours = {**config, "images a step": images}
    texts = [
        f"{_word(key)} {ours[key]} instead of {value}"
        for key, value in theirs.items()
        if key in ours and ours[key] != value
    ]
    if not complete:
        texts.append("other settings were not compared: no config of this line is shipped")
    held_out = config.get("DATASET.VAL_SPLIT", 0)
    if held_out:
        texts.append(
            f"{held_out} training images held out to select the epoch; published: the test set"
        )
    return texts


def _protocol(config: Mapping[str, Any], line: Published) -> tuple[dict[str, Any], bool]:
    """The settings of a published line, and whether they are all of them."""
    theirs = dict(_shipped(line, _standardised(config), _variant(config)))
    foreign = line.source.startswith("Knowledge-Distillation-Zoo")
    complete = bool(theirs) and not foreign
    if foreign:
        theirs = {"SOLVER.EPOCHS": 200, "SOLVER.BATCH_SIZE": 128}
    elif not complete:
        theirs = {"SOLVER.EPOCHS": 100} if line.dataset == "imagenet" else dict(_CIFAR)
    if "SOLVER.BATCH_SIZE" in theirs:
        theirs["images a step"] = theirs.pop("SOLVER.BATCH_SIZE")
    arguments = {key: "the default" for key in config if key.startswith(_ARGUMENTS)}
    return {**arguments, **theirs}, complete


_CIFAR = {"SOLVER.EPOCHS": 240, "SOLVER.BATCH_SIZE": 64}
_ARGUMENTS = ("DISTILLER.STUDENT_ARGS.", "DISTILLER.TEACHER_ARGS.")
_ELSEWHERE = (  # said in other words, or in `published_for`
    *("DATASET.ROOT", "DATASET.VAL_SPLIT", "DATASET.VAL_SEED", "SOLVER.ACCUMULATE", "SOLVER.DOT"),
    *("SOLVER.TRAINER", "DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT"),
)


def _word(key: str) -> str:
    return key.removeprefix("SOLVER.").lower() if key.startswith("SOLVER.") else key


def _plainly_trained(config: Mapping[str, Any]) -> bool:
    """By the base trainer, under one teacher."""
    plain = config.get("SOLVER.TRAINER") in ("base", "crd")  # two names of one
    return plain and not config.get("DISTILLER.TEACHERS")


def _variant(config: Mapping[str, Any]) -> str:
    """What a setting makes of a method, by the name it has in tables; "" for the method itself."""
    method = config.get("DISTILLER.TYPE", "")
    if method == "SDD":
        return f"SD-{str(config.get('SDD.BASE', '')).upper()}"
    if method == "WKD":
        logits, maps = (config.get(f"WKD.LOSS.WKD_{part}_WEIGHT", 0) for part in ("LOGIT", "FEAT"))
        return "WKD-LF" if logits > 0 and maps > 0 else "WKD-F" if maps > 0 else "WKD-L"
    divergence = str(config.get(f"{method}.DIVERGENCE", "kl"))
    return "" if divergence == "kl" else f"{method} by {divergence}"


def _standardised(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("LSKD.ENABLE", "EXPERIMENT.LOGIT_STAND"))


@lru_cache
def _shipped(line: Published, standardised: bool, variant: str) -> dict[str, Any]:
    """The settings of the config for a published line; empty if there is none."""
    for file in _configs(line.dataset, line.type).get((line.teacher, line.student), ()):
        cfg = load_config(file)
        whole = {key: lookup(cfg, key) for key in flatten(cfg)}
        alike = _standardised(whole) == standardised and _variant(whole) == variant
        if alike and _plainly_trained(whole):
            sections = ("DATASET.", "DISTILLER.", "LSKD.", "SOLVER.", f"{line.type}.")
            return {
                key: value
                for key, value in whole.items()
                if key.startswith(sections) and not key.startswith((*WITHOUT_EFFECT, *_ELSEWHERE))
            }
    return {}


@lru_cache
def _configs(dataset: str, method: str) -> dict[tuple[str, str], list[Path]]:
    """Shipped configs of a data set for a method, by teacher ("" without one) and student."""
    files: dict[tuple[str, str], list[Path]] = {}
    typed = re.compile(rf"\bTYPE:\s*[\"']?{re.escape(method)}\b")
    for file in sorted((config_root() / dataset).rglob("*.yaml")):
        if not typed.search(file.read_text(encoding="utf-8")):  # spares parsing most files
            continue
        named = read_yaml(file).get("DISTILLER", {})  # a sweep has none
        teacher = "" if _alone(method) else named.get("TEACHER", "")
        if named.get("TYPE", "NONE") == method and named.get("STUDENT"):
            files.setdefault((teacher, named["STUDENT"]), []).append(file)
    return files
