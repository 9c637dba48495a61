"""The networks to look at: of run folders, of files, or released ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mdistiller.dataset import TestData
from mdistiller.engine.build import build_network, find_teacher
from mdistiller.engine.cfg import Config
from mdistiller.engine.record import read_record, recorded_teacher_acc
from mdistiller.engine.released import PRETRAINED
from mdistiller.engine.run_folder import (
    checkpoint_file,
    read_json,
    recorded_config,
    refuse_commands,
)
from mdistiller.registry import UserError

Overrides = Sequence[str]


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        label: what to call it in tables and pictures.
        cfg: its architecture, in a role of DISTILLER.
        weights: a file, or PRETRAINED.
        note: of a run's best checkpoint, its epoch and what it was selected on.
        run: the run folder it is from.
    """

    label: str
    cfg: Config
    weights: Path | Literal["pretrained"]
    note: str = ""
    role: str = "STUDENT"
    run: Path | None = None

    @property
    def name(self) -> str:
        """The network's name in its zoo."""
        name: str = self.cfg.DISTILLER[self.role]
        return name


@dataclass(frozen=True)
class Subject:
    """A network in eval mode, and where it comes from."""

    source: Source
    net: nn.Module


def run_sources(folder: Path, checkpoints: Sequence[str], imports: Overrides = ()) -> list[Source]:
    """The students of these checkpoints of a run folder."""
    cfg = recorded_config(folder, imports=imports)
    summary = read_json(folder / "summary.json")
    sources = []
    for choice in checkpoints:
        note = ""
        if choice == "best" and summary:
            note = f"epoch {summary['best_epoch']}, selected on the {summary['selected_on']}"
        label = f"{'/'.join(folder.resolve().parts[-2:])} {choice}"
        path = checkpoint_file(folder, choice)
        sources.append(Source(label, cfg, path, note, run=folder))
    return sources


def run_teachers(
    sources: Sequence[Source], data: TestData
) -> list[tuple[Source, dict[Path, float | None]]]:
    """The different teachers of runs, each with its recorded accuracy in percent by run folder.

    None: not recorded.

    Args:
        sources: of run folders whose method used a teacher.

    Raises:
        UserError: the weights of one are not where they were.
    """
    found: dict[str, tuple[Source, dict[Path, float | None]]] = {}
    for one in {source.run: source for source in sources}.values():
        assert one.run is not None
        teacher = _run_teacher(one.run, one.cfg, data)
        settings = [teacher.cfg.DISTILLER[f"TEACHER{key}"] for key in ("", "_ARGS", "_NORM")]
        weights = teacher.weights if teacher.weights == PRETRAINED else teacher.weights.resolve()
        accuracies = found.setdefault(repr((settings, weights)), (teacher, {}))[1]
        accuracies[one.run] = recorded_teacher_acc(one.run)
    return list(found.values())


def _run_teacher(folder: Path, cfg: Config, data: TestData) -> Source:
    """The teacher of a run, from the file that `run.json` names, else from where its config says.

    The config that trained it is not read: with a folder of somebody else's it might name code.
    """
    said = read_record(folder).get("teacher")
    weights: Any = said if said == PRETRAINED else None
    if weights is None and isinstance(said, str) and (folder / said).is_file():
        weights = (folder / said).resolve()
    if weights is None:
        weights = find_teacher(cfg, data)
    name = cfg.DISTILLER.TEACHER
    if weights is None:
        raise UserError(
            f"the weights of {folder}'s teacher {name} are not there ({said or 'not recorded'})"
        )
    label = str(weights)
    if weights == PRETRAINED:
        label = f"{name} released"
    elif (weights.parent / "config.yaml").is_file():
        choice = weights.name.removeprefix("student_")
        label = f"{'/'.join(weights.parent.resolve().parts[-2:])} {choice}"
    return Source(label, cfg, weights, role="TEACHER")


def file_source(
    path: str, name: str, cfg: Config, imports: Overrides = (), role: str = "STUDENT"
) -> Source:
    """The network in a file, or the released one.

    Args:
        path: the file, or "pretrain" for released weights.
        name: its name in the zoo; empty for a file of a run folder, which says it itself.
        cfg: the config with the network's ARGS and NORM, for one with a name.
    """
    if name:
        own = cfg.clone()
        own.defrost()
        own.DISTILLER[role] = name
        own.freeze()
        if path == "pretrain":
            return Source(f"{name} released", own, PRETRAINED, role=role)
        return Source(path, own, Path(path), role=role)
    folder = Path(path).parent
    if path == "pretrain" or not (folder / "config.yaml").is_file():
        raise UserError(f"-m must name the network of {path}, which is of no run folder")
    return Source(path, recorded_config(folder, imports=imports), Path(path), run=folder)


def data_config(sources: Sequence[Source], overrides: Overrides, imports: Overrides) -> Config:
    """The config that says what data runs are looked at on: their own, if they share them.

    Raises:
        UserError: they do not.
    """
    runs = [source for source in sources if source.run is not None]
    first, facts = runs[0], _data_facts(runs[0].cfg)
    for other in runs[1:]:
        differ = [key for key, value in _data_facts(other.cfg).items() if value != facts[key]]
        if differ:
            key = f"DATASET.{differ[0]}"
            raise UserError(
                f"{first.run} and {other.run} were trained on different data ({key} "
                f"{first.cfg.DATASET[differ[0]]!r} and {other.cfg.DATASET[differ[0]]!r}); name the "
                "data for both by -d or --cfg"
            )
    assert first.run is not None
    cfg = recorded_config(first.run, overrides, imports)
    refuse_commands(first.run, cfg, overrides)
    return cfg


def _data_facts(cfg: Config) -> dict[str, Any]:
    keys = ("TYPE", "ROOT", "IMAGE_SIZE", "SHARDS")
    facts = {key: cfg.DATASET[key] for key in keys}
    return facts | {"ROOT": str(Path(facts["ROOT"]).resolve()) if facts["ROOT"] else ""}


def load(source: Source, test: TestData, device: torch.device) -> Subject:
    """Build a network for the data and load its weights."""
    net = build_network(source.cfg, source.role, test, source.weights)
    return Subject(source, net.to(device).eval().requires_grad_(False))
